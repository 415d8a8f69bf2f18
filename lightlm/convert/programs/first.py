"""Checkpoints of the first LightLM: model.checkpoint.N.pt, without experts. Imports nothing heavy.

Source: github.com/virg1n/LightLM, model.py and trainer.py (2025).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.huggingface.config import read_json
from lightlm.convert.layouts import Layout, Link
from lightlm.convert.programs.contents import (
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

_BLOCK = "blocks."
_TABLE = "tokens_embedding.weight"
_SETTINGS = "config.json"  # which a user writes, as the checkpoint does not hold them
_KNOWN = {49_152: "HuggingFaceTB/SmolLM-360M"}  # its training scripts' tokenizer
_LAYOUT = Layout(
    architecture="the first LightLM",
    keys={
        "num_layers": "num_layers",
        "hidden_size": "num_dims",
        "num_heads": "num_heads",
        "num_kv_heads": "num_kv_heads",
        "intermediate_size": "ffn_hidden_dims",
        "max_seq_len": "context_len",
        "vocab_size": "vocab_size",
        "norm_eps": "rmsnorm_eps",
        "rope_theta": "rope_theta",
    },
    fixed={"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"},
    rules={},
    defaults={"rmsnorm_eps": 1e-6, "rope_theta": 1e5},  # its ModelConfig's
    constants={"use_moe": (False,)},
    links=(
        Link("tokens_embedding", "embed_tokens"),
        Link("blocks.{}.norm_attention", "blocks.{}.attention_norm"),
        *(Link(f"blocks.{{}}.attention.w{name}", f"blocks.{{}}.attention.{name}_proj") for name in "qkvo"),
        Link("blocks.{}.norm_ffn", "blocks.{}.mlp_norm"),
        Link("blocks.{}.ffn.w1", "blocks.{}.mlp.gate_proj"),
        Link("blocks.{}.ffn.w3", "blocks.{}.mlp.up_proj"),
        Link("blocks.{}.ffn.w2", "blocks.{}.mlp.down_proj"),
        Link("norm", "norm"),
        Link("ll_head", "lm_head"),
    ),
)


class FirstLightLMCheckpoint(Format):
    """A file model.checkpoint.N.pt, beside a config.json with the settings that it does not hold."""

    name = "lightlm-2025"
    takes = "model.checkpoint.N.pt of the first LightLM"
    kinds = ("Transformer without experts",)

    def detect(self, path: Path) -> bool:
        return begins_with(path, _TABLE.encode(), b"attention.wq.weight")

    def shape(self, path: Path) -> "ModelConfig":
        return _read(path).config

    def read(self, path: Path) -> "LoadedModel":
        contents = _read(path)
        return contents.load(find_tokenizer(path, contents.config, [path.parent], _KNOWN), path)


def _read(path: Path) -> Contents:
    tensors = clean_tensors(read_torch_file(path).get("model"), path)
    if any(".ffn.experts." in name or ".ffn.router." in name for name in tensors):
        raise ConvertError(f"{path} has experts; of the first LightLM's checkpoints only those without are read")
    tied = merge_head(tensors, "ll_head.weight", _TABLE)
    beside = path.parent / _SETTINGS
    given = read_json(beside)
    given = given["config"] if isinstance(given.get("config"), dict) else given  # as huggingface_hub's mixin writes it
    values = _sizes(tensors, path) | given
    if missing := [name for name in ("num_heads", "context_len") if name not in given]:
        example = json.dumps({"num_heads": 16, "context_len": 1536} | _LAYOUT.defaults)
        raise ConvertError(
            f"{path} does not hold {' and '.join(missing)}, which its ModelConfig had: write them to {beside}, such as "
            f"{example}"
        )
    if "num_kv_heads" not in values and isinstance(heads := values["num_heads"], int) and heads > 0:
        values["num_kv_heads"] = len(tensors["blocks.0.attention.wk.weight"]) * heads // max(values["num_dims"], 1)
    blocks = count_blocks(tensors, _BLOCK)
    config = read_settings(_LAYOUT, values, f"{beside} with {path}", blocks, tie_embeddings=tied)
    return Contents(_LAYOUT, config, tensors, path)


def _sizes(tensors: dict[str, Any], path: Path) -> dict[str, int]:
    """Return the settings that the shapes of the tensors tell."""
    names = (_TABLE, "blocks.0.attention.wk.weight", "blocks.0.ffn.w1.weight")
    if problems := [name for name in names if name not in tensors or tensors[name].ndim != 2]:
        raise ConvertError(f"{path} is not a checkpoint of the first LightLM: {problems[0]} is missing or no matrix")
    vocab_size, width = tensors[_TABLE].shape
    return {
        "vocab_size": vocab_size,
        "num_dims": width,
        "num_layers": count_blocks(tensors, _BLOCK),
        "ffn_hidden_dims": len(tensors["blocks.0.ffn.w1.weight"]),
    }
