"""Checkpoints of nanoGPT: ckpt.pt, with its model's arguments. Imports nothing heavy.

Source: github.com/karpathy/nanoGPT, model.py, train.py and sample.py.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.layouts import Layout
from lightlm.convert.programs.contents import (
    GPT2_LINKS,
    GPT2_VOCABULARIES,
    Contents,
    begins_with,
    clean_tensors,
    count_blocks,
    find_tokenizer,
    merge_head,
    read_settings,
    read_torch_file,
)
from lightlm.convert.protocol import Format
from lightlm.errors import ConvertError

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig

_FILE = "ckpt.pt"
_BLOCK = "transformer.h."
_MASK = re.compile(r"\.attn\.bias$")  # without flash attention, a causal mask
_DATA_SET = re.compile(r"[\w.-]+")
_LAYOUT = Layout(
    architecture="nanoGPT",
    keys={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_heads": "n_head",
        "max_seq_len": "block_size",
        "vocab_size": "vocab_size",
        "bias": "bias",
    },
    # Since May 2023 it computes GELU itself, in older checkpoints, too.
    fixed={"norm": "layernorm", "norm_eps": 1e-5, "position": "learned", "mlp": "gelu_erf"},
    rules={},
    defaults={},
    constants={"bias": (False, True)},
    links=GPT2_LINKS,
)


class NanoGPTCheckpoint(Format):
    """A file ckpt.pt, or the folder that has it."""

    name = "nanogpt"
    takes = "ckpt.pt of nanoGPT, or its folder"
    kinds = ("GPT",)

    def detect(self, path: Path) -> bool:
        return begins_with(_file(path), b"transformer.wpe.weight")

    def shape(self, path: Path) -> "ModelConfig":
        return _read(path)[0].config

    def read(self, path: Path) -> "LoadedModel":
        contents, data_set = _read(path)
        folder = contents.file.parent
        folders = [folder]
        if _DATA_SET.fullmatch(data_set) and data_set not in (".", ".."):  # where sample.py looks
            folders += [root / "data" / data_set for root in (folder.resolve().parent, Path())]
        gpt2 = dict.fromkeys(GPT2_VOCABULARIES, "gpt2")
        return contents.load(find_tokenizer(path, contents.config, folders, gpt2), path)


def _file(path: Path) -> Path:
    return path / _FILE if path.is_dir() else path


def _read(path: Path) -> tuple[Contents, str]:
    """Return a checkpoint, and the name of the data set that it was trained on, if it says so."""
    file = _file(path)
    content = read_torch_file(file)
    values: Any = content.get("model_args")
    if not isinstance(values, dict):
        raise ConvertError(
            f"{file} is not a checkpoint of nanoGPT's train.py: it has no model_args; name a folder for a model of "
            "Hugging Face"
        )
    tensors = clean_tensors(content.get("model"), file)
    tensors = {name: tensor for name, tensor in tensors.items() if not _MASK.search(name)}
    tied = merge_head(tensors, "lm_head.weight", "transformer.wte.weight")
    values = {"bias": "transformer.ln_f.bias" in tensors} | values  # checkpoints of January 2023 do not say it
    where = f"{file} (model_args)"
    config = read_settings(_LAYOUT, values, where, count_blocks(tensors, _BLOCK), tie_embeddings=tied)
    said = content.get("config")
    data_set = said.get("dataset") if isinstance(said, dict) else None
    return Contents(_LAYOUT, config, tensors, file), data_set if isinstance(data_set, str) else ""
