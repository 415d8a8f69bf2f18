"""Read the header of a GGUF file: metadata, and where each tensor is. Every size is checked before memory is taken.

The `gguf` package reads headers too, but believes their sizes: an array of 2^60 elements fills the memory.

A file is magic, version, the numbers of tensors and of metadata; then the metadata, one key, type and value after the
other; then name, shape, type and offset of each tensor; then the tensors, aligned. All numbers are little-endian.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightlm.errors import ConvertError

MAGIC = b"GGUF"
VERSION_KEY = "lightlm.version"  # marks the files that LightLM wrote
_VERSIONS = (2, 3)  # 1 had 32-bit lengths; nobody writes it anymore
_MAX_HEADER = 1 << 26  # bytes; 256,000 tokens and their merges are 15 MB
_MAX_DIMENSIONS, _MAX_SIZE = 4, (1 << 31) - 1  # of a tensor, and of each dimension
_ALIGNMENT = 32  # unless `general.alignment` says otherwise
_STRING, _ARRAY = 8, 9
# Types of numbers as `struct` and numpy both write them.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _UINT64 = "<I", "<Q"


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is in a file, and its form; `shape` is in PyTorch's order."""

    shape: tuple[int, ...]
    type: int  # a value of `gguf.GGMLQuantizationType`
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """The metadata and the tensors of a file. Arrays of numbers are numpy arrays, other arrays lists of strings."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value as `kind`: int, float, bool or str; raise ConvertError if it is missing or of another.

        Args:
            default: what a missing key means; None where it must not be missing.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ConvertError(f"{self.path} is not a complete model: the key {key} is missing")
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (kind is not bool and isinstance(value, bool)):
            raise ConvertError(f"{self.path}: the key {key} is {str(value)[:60]!r}, which is not a {kind.__name__}")
        return float(value) if kind is float else value

    def texts(self, key: str) -> list[str]:
        """Return an array of strings; raise ConvertError if it is missing or of another kind."""
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise ConvertError(f"{self.path} is not a complete model: it has no array of texts {key}")
        return value

    def numbers(self, key: str) -> list[Any]:
        """Return an array of numbers; raise ConvertError if it is missing or of another kind."""
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray):
            raise ConvertError(f"{self.path} is not a complete model: it has no array of numbers {key}")
        return value.tolist()


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file that starts as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Return the header of a file; raise ConvertError if it is damaged, truncated, or of a version without readers."""
    try:
        with path.open("rb") as file:
            return _Reader(path, file, path.stat().st_size).header()
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from None


class _Reader:
    """A cursor in a file, which knows how much is left."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.end = min(size, _MAX_HEADER)

    def header(self) -> Header:
        if self.take(len(MAGIC)) != MAGIC:
            raise self.error("it does not start with GGUF")
        version = self.number(_UINT32)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise self.error("it is big-endian" if swapped else f"its version is {version}, not 2 or 3", damaged=False)
        num_tensors, num_values = self.number(_UINT64), self.number(_UINT64)
        self.reserve(num_tensors, 8 + 4 + 4 + 8, "tensors")
        self.reserve(num_values, 8 + 4 + 1, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.text()
            if key in metadata:
                raise self.error(f"the key {key!r} occurs twice")
            metadata[key] = self.value(self.number(_UINT32), key)
        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self.text()
            if name in places:
                raise self.error(f"the tensor {name!r} occurs twice")
            num_dimensions = self.number(_UINT32)
            if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
                raise self.error(f"the tensor {name!r} has {num_dimensions} dimensions")
            shape = tuple(reversed([self.number(_UINT64) for _ in range(num_dimensions)]))
            places[name] = shape, self.number(_UINT32), self.number(_UINT64)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}, not a power of 2")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {name: self.place(name, start, *place) for name, place in places.items()}
        self.refuse_overlap(tensors)
        return Header(self.path, metadata, tensors)

    def place(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> TensorPlace:
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise self.error(f"the tensor {name!r} has the unknown type {kind}; a newer `gguf` may know it", False)
        block, block_bytes = sizes[kind]
        if min(shape) < 1 or max(shape) > _MAX_SIZE or shape[-1] % block:
            raise self.error(f"the tensor {name!r} has the shape {shape}, in blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        if start + offset + size > self.size:
            raise self.error(f"the tensor {name!r} ends {start + offset + size - self.size:,} bytes after the file")
        return TensorPlace(shape, kind, start + offset, size)

    def refuse_overlap(self, tensors: dict[str, TensorPlace]) -> None:
        """Raise ConvertError if tensors share bytes: they would take more memory than the file has."""
        end = 0
        for name, place in sorted(tensors.items(), key=lambda item: item[1].offset):
            if place.offset < end:
                raise self.error(f"the tensor {name!r} overlaps another")
            end = place.offset + place.size

    def value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text(strict=False)
        if kind != _ARRAY:
            raise self.error(f"the key {key!r} has the unknown type {kind}")
        kind, count = self.number(_UINT32), self.number(_UINT64)
        if kind == _STRING:
            self.reserve(count, 8, f"elements of {key}")
            return [self.text(strict=False) for _ in range(count)]
        if kind not in _NUMBERS:
            raise self.error(f"the array {key!r} has elements of the type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        self.reserve(count, dtype.itemsize, f"elements of {key}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self, *, strict: bool = True) -> str:
        """Return a string; names must be UTF-8, values may have bytes that are not."""
        data = self.take(self.number(_UINT64))
        try:
            return data.decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError:
            raise self.error("a name is not UTF-8") from None

    def take(self, count: int) -> bytes:
        self.reserve(count, 1, "bytes")
        data = self.file.read(count)
        if len(data) != count:
            raise self.error("it ends in its header")
        return data

    def reserve(self, count: int, size: int, what: str) -> None:
        """Raise ConvertError unless the rest of the header has room for `count` things of at least `size` bytes."""
        if count * size <= self.end - self.file.tell():
            return
        if self.end < self.size and count * size <= self.size - self.file.tell():
            raise self.error(f"its header has more than {_MAX_HEADER >> 20} MiB")
        raise self.error(f"it says that {count:,} {what} follow, which is more than the file has")

    def error(self, problem: str, damaged: bool = True) -> ConvertError:
        advice = "; download or export it again" if damaged else ""
        return ConvertError(f"{self.path} is {'damaged' if damaged else 'not readable here'}: {problem}{advice}")
