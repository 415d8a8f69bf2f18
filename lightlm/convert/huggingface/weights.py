"""Read the files of weights in a Hugging Face folder."""

import re
import reprlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightlm import files
from lightlm.convert.huggingface.config import WEIGHT_FILES, read_json
from lightlm.convert.layouts import Layout
from lightlm.convert.pickles import read_pickle
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer

# Causal masks in old GPT-2 files and rotary frequencies in old Llama files: constants, not weights.
_CONSTANTS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def with_shared_experts(config: ModelConfig, state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return tensors with shared experts of zeros where a class always has some and the model has none."""
    zeros = {}
    for block in filter(config.has_experts, range(config.num_layers)):
        for name in ("gate_proj", "up_proj", "down_proj"):
            size = (config.hidden_size, width) if name == "down_proj" else (width, config.hidden_size)
            zeros[f"blocks.{block}.mlp.shared.{name}.weight"] = torch.zeros(size)
    return state | zeros


def with_all_biases(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with biases of zeros where a class always has some and the model has none."""
    with torch.device("meta"):
        wanted = Transformer(replace(config, bias=True, bias_in="all")).state_dict()
    biases = {name: tensor for name, tensor in wanted.items() if name.endswith(".bias") and name not in state}
    return state | {name: torch.zeros(tensor.shape) for name, tensor in biases.items()}


def only_weights(layout: Layout, config: ModelConfig, given: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors under their full names, without constants, empty tensors and the copy of a tied head."""
    given = {name: tensor for name, tensor in given.items() if tensor.numel() and not _CONSTANTS.search(name)}
    if not any(name.startswith(layout.base) for name in given):  # saved from the model without its head
        given = {name if name.startswith("lm_head.") else layout.base + name: given[name] for name in given}
    if config.tie_embeddings and "lm_head.weight" in given:
        embedding = given.get(layout.links[0].theirs + ".weight")
        if embedding is not None and not torch.equal(given.pop("lm_head.weight"), embedding):
            raise ConvertError(
                f"{folder}: config.json says tie_word_embeddings: true, but lm_head.weight differs from the embedding; "
                "set it to false if the model has a head of its own"
            )
    return given


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a Hugging Face folder by name.

    Raises:
        ConvertError: a file is missing or damaged, a tensor occurs twice, or is not of floating-point numbers.
        DataError: a file is a Git LFS pointer.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        part = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        if not isinstance(part, dict) or not all(isinstance(tensor, Tensor) for tensor in part.values()):
            raise ConvertError(f"{path} is not a model's weights: it does not hold tensors by name")
        if twice := sorted(part.keys() & state.keys()):
            raise ConvertError(
                f"{path} holds {twice[0]}, which another file of {folder} holds too; download both again"
            )
        for name, tensor in part.items():
            if tensor.dtype not in _DTYPES and not _CONSTANTS.search(name):
                raise ConvertError(
                    f"{path}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, perhaps quantized; "
                    "LightLM reads float32, float16, bfloat16 and float64: export full-precision weights first"
                )
        state |= part
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ConvertError: the file is damaged.
        DataError: it is a Git LFS pointer.
    """
    files.refuse_lfs_pointer(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path} cannot be read: it is damaged or cut off ({error}); download it again") from None


def _is_file_name(text: str) -> bool:
    return 0 < len(text) < 256 and text == Path(text).name and "\\" not in text


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder's tensors, safetensors before PyTorch; raise ConvertError if any is missing."""
    for name in WEIGHT_FILES:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return (folder / name,)
        parts = read_json(folder / name).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
            raise ConvertError(f"{folder / name} is damaged: it has no weight_map of tensors and files")
        if outside := sorted(part for part in parts.values() if not _is_file_name(part)):
            raise ConvertError(
                f"{folder / name} names {reprlib.repr(outside[0])}, which is not a file of its folder; it is not read"
            )
        paths = tuple(folder / part for part in sorted(set(parts.values())))
        if missing := [path for path in paths if not path.is_file()]:
            raise ConvertError(f"{missing[0]} is missing, though {name} lists it; download it again")
        return paths
    raise ConvertError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)} is there")
