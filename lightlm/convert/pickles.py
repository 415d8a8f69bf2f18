"""Read files that `torch.save` wrote, without running what a pickle may ask for."""

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightlm import files
from lightlm.errors import ConvertError

_CALLED = re.compile(r"GLOBAL ([\w.]+)")  # in the message of torch's unpickler: what a file asks for


def read_pickle(path: Path) -> Any:
    """Return what `torch.save` wrote to a file, on the CPU, if it is made of tensors and plain values.

    Raises:
        ConvertError: the file would run code, is damaged, is a Git LFS pointer, or its tensors would take more memory
            than the file has bytes. Nothing of it has been run.
    """
    files.refuse_lfs_pointer(path)
    damaged = f"{path} cannot be read: it is damaged or cut off"
    try:
        if zipped := zipfile.is_zipfile(path):
            _refuse_compression(path)
        # Memory-mapped, because a training program's checkpoint is three times as large as its weights.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        swollen = [
            tuple(tensor.shape)
            for tensor in _tensors(content)
            if tensor.is_meta or _bytes(tensor) > tensor.untyped_storage().nbytes()
        ]
    except pickle.UnpicklingError as error:
        if called := _CALLED.search(str(error)):
            raise ConvertError(
                f"{path} is refused: reading it would call {called[1]}, which could be any code. Get the model as "
                "safetensors, or have whoever made the file save only its tensors"
            ) from None
        raise ConvertError(f"{damaged}; download it again") from None
    except ConvertError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from None
    # Damaged pickles raise errors of almost any kind.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConvertError(f"{damaged} ({reason}); download it again") from None
    if swollen:  # a view of few bytes, which a copy would turn into as many as its shape says
        raise ConvertError(f"{path} is damaged: a tensor of shape {swollen[0]} has fewer bytes than elements need")
    return content


def _refuse_compression(path: Path) -> None:
    """Raise ConvertError if an archive's contents are larger than it is; torch.save never compresses."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ConvertError(f"{path} is not a file of torch.save: its contents are compressed")


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries, lists and tuples."""
    left, seen = [content], set[int]()
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            left += item.values() if isinstance(item, dict) else item


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
