"""Checkpoints of llm.c: GPT-2 in one .bin file, in float32 or bfloat16. Imports nothing heavy.

Source: github.com/karpathy/llm.c, train_gpt2.py (`write_model`).
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightlm.convert.layouts import Layout
from lightlm.convert.programs.contents import (
    GPT2_LINKS,
    GPT2_VOCABULARIES,
    LARGEST_SETTING,
    Contents,
    find_tokenizer,
    read_settings,
)
from lightlm.convert.protocol import Format
from lightlm.errors import ConvertError

if TYPE_CHECKING:
    from torch import Tensor

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig

_HEADER = struct.Struct("<256i")
_MAGIC, _LLAMA_MAGIC = 20240326, 20240803
_PRECISIONS = {3: ("float32", 4), 5: ("bfloat16", 2)}  # version -> type of the elements, and its bytes
_SETTINGS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "padded_vocab_size")  # after the version
_LAYOUT = Layout(
    architecture="GPT-2 of llm.c",
    keys={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_heads": "n_head",
        "max_seq_len": "block_size",
        "vocab_size": "vocab_size",
    },
    fixed={"norm": "layernorm", "norm_eps": 1e-5, "position": "learned", "mlp": "gelu", "bias": True},
    rules={},
    defaults={},
    constants={},
    links=GPT2_LINKS,
)


class LlmcCheckpoint(Format):
    """A file such as gpt2_124M.bin, or model_00019552.bin of a run."""

    name = "llmc"
    takes = "a .bin file of llm.c's GPT-2"
    kinds = ("GPT-2",)

    def detect(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            magic = file.read(4)
        return len(magic) == 4 and int.from_bytes(magic, "little") in (_MAGIC, _LLAMA_MAGIC)

    def shape(self, path: Path) -> "ModelConfig":
        return _config(path, _read_header(path)[1])

    def read(self, path: Path) -> "LoadedModel":
        version, values = _read_header(path)
        contents = Contents(_LAYOUT, _config(path, values), _read_tensors(path, version, values), path)
        gpt2 = dict.fromkeys(GPT2_VOCABULARIES, "gpt2")
        return contents.load(find_tokenizer(path, contents.config, [path.parent], gpt2), path)


def _read_header(path: Path) -> tuple[int, dict[str, int]]:
    """Return the version and the settings; raise ConvertError unless the file has the length that they give."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise ConvertError(f"{path} is cut off: it ends inside its header; download it again")
    magic, version, *numbers = _HEADER.unpack(head)
    if magic == _LLAMA_MAGIC:
        raise ConvertError(f"{path} holds Llama 3 in llm.c's form; of llm.c's files LightLM reads those of GPT-2")
    if version not in _PRECISIONS:
        known = " and ".join(f"{each} ({kind})" for each, (kind, _) in _PRECISIONS.items())
        raise ConvertError(f"{path} has version {version} of llm.c's form; LightLM reads {known}: write it anew")
    values = dict(zip(_SETTINGS, numbers, strict=False))
    for name, value in values.items():
        if not 0 < value <= LARGEST_SETTING:
            raise ConvertError(f"{path} is damaged: its header has {name} {value}")
    if values["padded_vocab_size"] < values["vocab_size"]:
        raise ConvertError(f"{path} is damaged: its header pads {values['vocab_size']} tokens to fewer")
    size = _HEADER.size + _PRECISIONS[version][1] * sum(
        count * math.prod(shape) for _, shape, count in _tensor_groups(values)
    )
    if path.stat().st_size != size:
        raise ConvertError(
            f"{path} has {path.stat().st_size:,} bytes, but the model in its header takes {size:,}; it is cut off or "
            "damaged: download it again"
        )
    return version, values


def _config(path: Path, values: dict[str, int]) -> "ModelConfig":
    return read_settings(_LAYOUT, dict(values), f"{path} (its header)", values["n_layer"], tie_embeddings=True)


def _tensor_groups(values: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield name, shape and number of the tensors in the order of the file; `{}` is the block."""
    width = values["n_embd"]
    yield "transformer.wte.weight", (values["padded_vocab_size"], width), 1
    yield "transformer.wpe.weight", (values["block_size"], width), 1
    for name, outputs, inputs in (
        ("ln_1", width, 0),
        ("attn.c_attn", 3 * width, width),
        ("attn.c_proj", width, width),
        ("ln_2", width, 0),
        ("mlp.c_fc", 4 * width, width),
        ("mlp.c_proj", width, 4 * width),
    ):
        yield f"transformer.h.{{}}.{name}.weight", (outputs, inputs) if inputs else (outputs,), values["n_layer"]
        yield f"transformer.h.{{}}.{name}.bias", (outputs,), values["n_layer"]
    yield "transformer.ln_f.weight", (width,), 1
    yield "transformer.ln_f.bias", (width,), 1


def _read_tensors(path: Path, version: int, values: dict[str, int]) -> "dict[str, Tensor]":
    """Return the tensors by name, memory-mapped, without the rows that pad the vocabulary."""
    import numpy as np
    import torch

    kind, size = _PRECISIONS[version]
    # Memory-mapped as integers, as numpy has no bfloat16, and privately, as torch expects memory that can be written.
    mapped = np.memmap(path, f"<i{size}", "c", _HEADER.size)
    data = torch.from_numpy(mapped).view(getattr(torch, kind))
    tensors, place = {}, 0
    for name, shape, count in _tensor_groups(values):
        for block in range(count):
            tensors[name.format(block)] = data[place : place + math.prod(shape)].view(shape)
            place += math.prod(shape)
    table = "transformer.wte.weight"
    tensors[table] = tensors[table][: values["vocab_size"]]
    return tensors
