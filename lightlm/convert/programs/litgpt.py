"""Checkpoints of litgpt: lit_model.pth with model_config.yaml and tokenizer files. Imports nothing heavy.

Source: github.com/Lightning-AI/litgpt, litgpt/config.py and litgpt/model.py (0.5).
"""

import math
import reprlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.huggingface.config import WEIGHT_FILES
from lightlm.convert.layouts import Layout, Link
from lightlm.convert.programs.contents import (
    Contents,
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
    from torch import Tensor

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig

_WEIGHTS, _SETTINGS = "lit_model.pth", "model_config.yaml"
_LARGEST_YAML = 1 << 20  # bytes
_BLOCK = "transformer.h."
_QKV_BIASES = (".attn.qkv.bias", ".attn.attn.bias")
_NORMS = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}
_GELUS = {"none": "gelu_erf", "tanh": "gelu"}

_SWIGLU = {"fc_1": "gate_proj", "fc_2": "up_proj", "proj": "down_proj"}
_GELU = {"fc": "up_proj", "proj": "down_proj"}
_COMMON_LINKS = (
    Link("transformer.wte", "embed_tokens"),
    Link("transformer.h.{}.norm_1", "blocks.{}.attention_norm"),
    *(Link(f"transformer.h.{{}}.attn.{name}", f"blocks.{{}}.attention.{name}_proj") for name in "qkv"),
    *(Link(f"transformer.h.{{}}.attn.norm_{name}", f"blocks.{{}}.attention.{name}_norm") for name in "qk"),
    Link("transformer.h.{}.attn.proj", "blocks.{}.attention.o_proj"),
    Link("transformer.h.{}.norm_2", "blocks.{}.mlp_norm"),
    Link("transformer.ln_f", "norm"),
    Link("lm_head", "lm_head"),
)
_EXPERT_LINKS = (
    Link("transformer.h.{}.mlp.gate", "blocks.{}.mlp.router"),
    *(
        Link(f"transformer.h.{{}}.mlp.experts.*.{theirs}.weight", f"blocks.{{}}.mlp.experts.{ours}")
        for theirs, ours in _SWIGLU.items()
    ),
    *(
        Link(f"transformer.h.{{}}.mlp.shared_experts.{theirs}", f"blocks.{{}}.mlp.shared.{ours}")
        for theirs, ours in _SWIGLU.items()
    ),
)


_LINKS = {
    network: _COMMON_LINKS
    + tuple(Link(f"transformer.h.{{}}.mlp.{theirs}", f"blocks.{{}}.mlp.{ours}") for theirs, ours in names.items())
    for network, names in (("LLaMAMLP", _SWIGLU), ("GptNeoxMLP", _GELU), ("LLaMAMoE", _SWIGLU))
}
_LINKS["LLaMAMoE"] += _EXPERT_LINKS


# What its Config has where a file does not say it.
_DEFAULTS: dict[str, Any] = {
    "block_size": 4096, "n_layer": 16, "n_embd": 4096, "n_head": 32, "norm_class_name": "LayerNorm", "norm_eps": 1e-5,
    "parallel_residual": True, "bias": True, "rope_base": 10_000, "rotary_percentage": 0.25, "padding_multiple": 512,
    "vocab_size": 50_254, "mlp_class_name": "GptNeoxMLP", "gelu_approximate": "none", "n_shared_expert": 0,
    "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
}  # fmt: skip
# What the model must have. A file that lacks a key has the first value, unless `_DEFAULTS` says otherwise.
_CONSTANTS: dict[str, tuple[Any, ...]] = {
    "parallel_residual": (False,),
    "shared_attention_norm": (False,),
    "post_attention_norm": (False,),
    "post_mlp_norm": (False,),
    "norm_1": (True,),
    "norm_2": (True,),
    "norm_class_name": tuple(_NORMS),
    "norm_qk_type": ("default",),
    "rotary_percentage": (1.0, 1),
    "rope_interleave": (False,),
    "rope_local_base_freq": (None,),
    "rope_indices": (None,),
    "attention_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "lm_head_bias": (False,),
    "latent_attention": (None,),
    "mlp_class_name": tuple(_LINKS),
    "gelu_approximate": tuple(_GELUS),
    "n_expert_groups": (None,),
}
_LAYOUT = Layout(
    architecture="litgpt's GPT",
    keys={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_heads": "n_head",
        "num_kv_heads": "n_query_groups",
        "head_dim": "head_size",
        "intermediate_size": "intermediate_size",
        "max_seq_len": "block_size",
        "vocab_size": "padded_vocab_size",
        "norm_eps": "norm_eps",
        "rope_theta": "rope_base",
    },
    fixed={"position": "rope"},
    rules={},
    defaults=_DEFAULTS,
    constants=_CONSTANTS,
    links=(),
)
_EXPERT_KEYS = {
    "num_experts": "n_expert",
    "num_experts_per_tok": "n_expert_per_token",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_shared_experts": "n_shared_expert",
    "first_k_dense": "first_k_dense_replace",
    "routed_scaling_factor": "routed_scaling_factor",
}
# Keys that `_read_config` and `_obstacles` read, and those without effect on what the model computes.
_READ = {
    "norm_qk", "scale_embeddings", "attention_scores_scalar", "sliding_window_size", "rope_condense_ratio",
    "rope_adjustments",
}  # fmt: skip
# The keys of rope_adjustments -> our field for each. Others, such as YaRN's, are refused.
_ROPE = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_seq_len": "rope_original_seq_len",
}
_IDLE = {
    "name", "hf_config", "padding_multiple", "vocab_size", "bias", "attn_bias", "sliding_window_indices",
    "sliding_window_layer_placing", "sliding_window_layer_stride", "n_topk_groups", "n_topk_scores_per_group",
    "norm_topk_prob",
}  # fmt: skip
_KNOWN = {*_LAYOUT.keys.values(), *_EXPERT_KEYS.values(), *_CONSTANTS, *_READ, *_IDLE}


class LitGPTCheckpoint(Format):
    """A folder with lit_model.pth and model_config.yaml, or the first of them."""

    name = "litgpt"
    takes = "a folder with lit_model.pth of litgpt"
    kinds = ("GPT: one residual branch after the other, rotary positions on whole heads",)

    def detect(self, path: Path) -> bool:
        if path.is_dir() and any((path / name).is_file() for name in WEIGHT_FILES):
            return False  # `litgpt download` leaves the model of Hugging Face beside its own
        file = _file(path)
        named = file.name == _WEIGHTS or (file.suffix == ".pth" and file.with_name(_SETTINGS).is_file())
        return named and file.is_file()

    def shape(self, path: Path) -> "ModelConfig":
        return _read(path).config

    def read(self, path: Path) -> "LoadedModel":
        contents = _read(path)
        return contents.load(find_tokenizer(path, contents.config, [contents.file.parent], {}), path)


def _file(path: Path) -> Path:
    return path / _WEIGHTS if path.is_dir() else path


def _read(path: Path) -> Contents:
    file = _file(path)
    content = read_torch_file(file)
    tensors = clean_tensors(content.get("model", content), file)
    tied = merge_head(tensors, "lm_head.weight", "transformer.wte.weight")
    layout, config = _read_config(file.with_name(_SETTINGS), tensors, tied)
    tensors = _split_qkv(tensors, config, file)
    if config.bias and config.bias_in == "all":
        _add_zero_biases(tensors, config)
    return Contents(layout, config, tensors, file)


def _read_config(path: Path, tensors: "dict[str, Tensor]", tied: bool) -> tuple[Layout, "ModelConfig"]:
    """Return the table and the shape of a model_config.yaml; raise ConvertError if LightLM has no such model."""
    values = _resolved(_read_yaml(path))
    network = values["mlp_class_name"]
    layout = replace(_LAYOUT, links=_LINKS[network] if isinstance(network, str) and network in _LINKS else ())
    more: dict[str, Any] = {
        "norm": _NORMS.get(str(values["norm_class_name"]), ""),
        "mlp": _GELUS.get(str(values["gelu_approximate"]), "") if network == "GptNeoxMLP" else "swiglu",
        "bias": bool(biased := [name for name in tensors if name.endswith(".bias")]),
        "bias_in": "qkv" if biased and all(name.endswith(_QKV_BIASES) for name in biased) else "all",
        "qk_norm": values.get("norm_qk") is True,
        "tie_embeddings": tied,
    }
    if network == "LLaMAMoE":
        layout = replace(layout, keys=layout.keys | _EXPERT_KEYS)
        more |= {"router": "softmax", "norm_topk_prob": True}
    rope = _read_rope(values)
    problems = _obstacles(values, more["norm"])
    if rope is None:
        said = ", ".join(f"{key} is {reprlib.repr(values[key])}" for key in sorted(_READ & {*values}) if "rope" in key)
        problems.append(f"{said}: must be a factor, or Llama 3's four settings")
    if problems:
        raise ConvertError(f"{path} describes a model LightLM does not have: {'; '.join(problems)}")
    if values.get("scale_embeddings") is True and isinstance(values["n_embd"], int):
        more["embedding_scale"] = math.sqrt(abs(values["n_embd"]))
    return layout, read_settings(layout, values, str(path), count_blocks(tensors, _BLOCK), **more, **rope or {})


def _read_rope(values: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields that scale rotary positions, empty without; None for what LightLM does not compute."""
    factor, adjustments = values.get("rope_condense_ratio", 1), values.get("rope_adjustments")
    if adjustments is None and factor != 1:
        adjustments = {"factor": factor}
    if adjustments is None:
        return {}
    if not isinstance(adjustments, dict) or adjustments.keys() not in ({"factor"}, _ROPE.keys()):
        return None
    numbers = [each for each in (factor, *adjustments.values()) if type(each) in (int, float) and 0 < each < 1 << 24]
    if len(numbers) <= len(adjustments) or factor not in (1, adjustments["factor"]):
        return None
    found = {ours: adjustments[theirs] for theirs, ours in _ROPE.items() if theirs in adjustments}
    return found | {"rope_scaling": "linear" if len(found) == 1 else "llama3"}


def _resolved(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with those filled in that litgpt derives from others; null means such a one."""
    values: dict[str, Any] = _DEFAULTS | {key: value for key, value in given.items() if value is not None}
    width, heads, size, multiple = (values[key] for key in ("n_embd", "n_head", "vocab_size", "padding_multiple"))
    if all(isinstance(each, int) and each > 0 for each in (width, heads, size, multiple)):
        derived = {
            "head_size": width // heads,
            "n_query_groups": heads,
            "intermediate_size": 4 * width,
            "padded_vocab_size": -(-size // multiple) * multiple,
        }
        values = derived | values
        values.setdefault("moe_intermediate_size", values["intermediate_size"])
    return values


def _obstacles(values: dict[str, Any], norm: str) -> list[str]:
    """Return what keeps a model from LightLM, beyond `_CONSTANTS`."""
    problems = [
        f"{key} is {reprlib.repr(value)}, which this version of LightLM does not know"
        for key, value in sorted(values.items())
        if key not in _KNOWN
    ]
    scale, size = values.get("attention_scores_scalar"), values.get("head_size")
    if scale is not None and scale != size:
        problems.append(f"attention_scores_scalar is {reprlib.repr(scale)}, must be head_size, {reprlib.repr(size)}")
    window, length = values.get("sliding_window_size"), values["block_size"]
    if window is not None and not (isinstance(window, int) and isinstance(length, int) and window >= length):
        problems.append(f"sliding_window_size is {reprlib.repr(window)}, must be null or at least block_size")
    if values.get("norm_qk") is True and norm != "rmsnorm":
        problems.append("norm_qk is true, must be false with LayerNorm")
    name = str(values.get("name", ""))
    if ("Gemma" in name and norm == "rmsnorm") or ("OLMo" in name and norm == "layernorm"):
        problems.append(f"name is {name[:40]!r}, for which litgpt computes other norms")
    return problems


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        if path.stat().st_size > _LARGEST_YAML:
            raise ConvertError(f"{path} has {path.stat().st_size:,} bytes; litgpt's have some thousand")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConvertError(f"{path} is missing; litgpt writes it beside {_WEIGHTS}: copy it there") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConvertError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConvertError(f"{path} is not a list of settings")
    return values


def _split_qkv(tensors: "dict[str, Tensor]", config: "ModelConfig", path: Path) -> "dict[str, Tensor]":
    """Return the tensors with queries, keys and values apart.

    `attn.qkv` holds all queries, then all keys, then all values. `attn.attn`, its name before 2025, holds each group:
    its queries, its key and its value.
    """
    queries, groups = config.num_heads // config.num_kv_heads, config.num_kv_heads
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for theirs in (".attn.qkv.", ".attn.attn."):
            if theirs not in name:
                continue
            if len(tensor) != (wanted := (config.num_heads + 2 * groups) * config.head_dim):
                raise ConvertError(f"{path}: {name} has {len(tensor)} rows, its settings give {wanted}")
            if theirs == ".attn.attn.":
                grouped = tensor.unflatten(0, (groups, queries + 2, config.head_dim)).split((queries, 1, 1), dim=1)
                parts = [part.flatten(0, 2) for part in grouped]
            else:
                parts = list(tensor.split([count * config.head_dim for count in (config.num_heads, groups, groups)]))
            found |= {name.replace(theirs, f".attn.{part}."): rows for part, rows in zip("qkv", parts, strict=True)}
            break
        else:
            found[name] = tensor
    return found


def _add_zero_biases(tensors: "dict[str, Tensor]", config: "ModelConfig") -> None:
    """Add biases of zeros where only some parts have them: ours have all or none."""
    import torch

    for name in [name for name in tensors if name.startswith((_BLOCK, "transformer.ln_f."))]:
        is_norm, bias = "norm" in name or "ln_f" in name, f"{name.removesuffix('weight')}bias"
        has_none = ".norm_q." in name or ".norm_k." in name or (is_norm and config.norm == "rmsnorm")
        if name.endswith(".weight") and bias not in tensors and not has_none:
            tensors[bias] = torch.zeros(len(tensors[name]))
