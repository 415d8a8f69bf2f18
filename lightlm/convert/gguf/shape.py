"""The shape of a model from a GGUF file's metadata, by the tables in `layouts`."""

from typing import Any

import numpy as np

from lightlm.convert.gguf.header import Header
from lightlm.convert.gguf.layouts import ABSORBED, GATING, HARMLESS, LAYOUTS, REPEATED
from lightlm.convert.layouts import Layout
from lightlm.errors import ConvertError
from lightlm.model.config import BIASED, EXPERT_FIELDS, ModelConfig, Part

# What other programs have no key for: the standard deviation of initial weights, and that shared experts are zeros.
INIT_STD, SHARED_EXPERTS = "lightlm.init_std", "lightlm.num_shared_experts"
# Llama 3's rotary scaling: a tensor of divisors, and our keys for the rule that they follow.
DIVISORS = "rope_freqs.weight"
_LLAMA3_RULE = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_seq_len": 8192}
_FLOAT32 = 0  # of `gguf.GGMLQuantizationType`
_BIASED: dict[Part, str] = {"qkv": "attn_q", "output": "attn_output", "mlp": "ffn_up"}  # a tensor of each part
_KINDS = {"norm_eps": float, "rope_theta": float, "routed_scaling_factor": float, "norm_topk_prob": bool}


def read_shape(header: Header) -> tuple[str, ModelConfig]:
    """Return the layout and the shape that a file describes.

    Raises:
        ConvertError: LightLM does not have such a model; the message lists every key in the way.
    """
    architecture = header.get("general.architecture", str)
    names = [name for name, layout in LAYOUTS.items() if layout.architecture == architecture]
    if not names:
        known = ", ".join(sorted({layout.architecture for layout in LAYOUTS.values()}))
        raise ConvertError(f"{header.path} holds a model of the architecture {architecture!r}; LightLM reads {known}")
    experts = header.get(f"{architecture}.expert_count", int, 0)
    name = next((name for name in names if ("num_experts" in LAYOUTS[name].keys) == (experts > 0)), names[0])
    layout = LAYOUTS[name]
    if problems := _problems(header, layout):
        raise ConvertError(f"{header.path} describes a model LightLM does not have: {'; '.join(problems)}")
    settings = {
        ours: _value(header, f"{architecture}.{theirs}", _KINDS.get(ours, int), layout.defaults.get(theirs))
        for ours, theirs in layout.keys.items()
    }
    settings |= _from_tensors(header, layout)
    if layout.fixed["position"] == "rope":
        settings |= _rotary(header, architecture)
    settings["init_std"] = _value(header, INIT_STD, float, ModelConfig.init_std)
    if "num_shared_experts" in settings:
        settings["num_shared_experts"] = header.get(SHARED_EXPERTS, int, settings["num_shared_experts"])
    if "router" in settings:
        settings["router"] = next((ours for ours, theirs in GATING.items() if theirs == settings["router"]), None)
        if settings["router"] is None:
            raise ConvertError(f"{header.path}: expert_gating_func must be one of {sorted(GATING.values())}")
    if layout.fixed["attention"] == "mla":
        settings["qk_nope_head_dim"] = settings["head_dim"] - settings["qk_rope_head_dim"]
        if not settings["num_experts"]:
            settings |= {name: getattr(ModelConfig, name) for name in EXPERT_FIELDS}
    try:
        config = ModelConfig(**(layout.fixed | settings)).resolved()
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{header.path} does not describe a model: {error}") from None
    _check_sizes(header, config)
    return name, config


def _check_sizes(header: Header, config: ModelConfig) -> None:
    """Raise ConvertError for sizes that no tensor has: a model of them could take any amount of memory."""
    if config.num_layers > len(header.tensors):
        raise ConvertError(f"{header.path} has {config.num_layers:,} blocks, but {len(header.tensors)} tensors")
    largest = max(max(place.shape) for place in header.tensors.values())
    experts = (config.num_experts, config.num_shared_experts * config.moe_intermediate_size)
    heads = config.num_heads * max(config.head_dim, config.value_dim)
    sizes = (config.hidden_size, config.intermediate_size, heads, config.kv_lora_rank, config.q_lora_rank, *experts)
    if max(sizes) > largest:
        raise ConvertError(
            f"{header.path} does not describe a model: it says {max(sizes):,}, but no tensor has more than {largest:,}"
        )


def _from_tensors(header: Header, layout: Layout) -> dict[str, Any]:
    """Return the settings that only the tensors tell."""
    table = header.tensors.get("token_embd.weight")
    if table is None:
        raise ConvertError(f"{header.path} is not a complete model: the tensor token_embd.weight is missing")
    found: dict[str, Any] = {"vocab_size": table.shape[0], "tie_embeddings": "output.weight" not in header.tensors}
    if "bias" in layout.rules:
        biased = {part for part, name in _BIASED.items() if f"blk.0.{name}.bias" in header.tensors}
        found["bias"] = bool(biased)
        found["bias_in"] = next((name for name, parts in BIASED.items() if {*parts} - {"norm"} == biased), "all")
    if "qk_norm" in layout.rules:
        found["qk_norm"] = "blk.0.attn_q_norm.weight" in header.tensors
    return found


def _rotary(header: Header, architecture: str) -> dict[str, Any]:
    """Return the fields of rotary scaling."""
    key = f"{architecture}.rope.scaling"
    scaling = header.get(f"{key}.type", str, "none")
    if (place := header.tensors.get(DIVISORS)) is None:
        return {"rope_scaling": scaling, "rope_factor": _value(header, f"{key}.factor", float, 1.0)}
    if scaling != "none" or place.type != _FLOAT32:
        raise ConvertError(f"{header.path} has {DIVISORS} beside {key}.type {scaling!r}, or not in float32")
    divisors = np.fromfile(header.path, "<f4", place.size // 4, offset=place.offset)
    fields = {name: _value(header, f"lightlm.{name}", type(usual), usual) for name, usual in _LLAMA3_RULE.items()}
    return {"rope_scaling": "llama3", "rope_factor": float(str(divisors.max())), **fields}


def write_rotary(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata of rotary scaling, `ARCHITECTURE.KEY` without ARCHITECTURE, and that under its full name."""
    if config.rope_scaling == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_factor)}, {}
    if config.rope_scaling == "llama3":
        values = {name: type(usual)(getattr(config, name)) for name, usual in _LLAMA3_RULE.items()}
        return {}, {f"lightlm.{name}": value for name, value in values.items()}
    return {}, {}


def _value(header: Header, key: str, kind: type, default: Any) -> Any:
    value = header.get(key, kind, default)
    # Files hold float32. The shortest decimal that rounds to it is what was meant: 1e-05, not 9.999999747e-06.
    return float(str(np.float32(value))) if kind is float else value


def _problems(header: Header, layout: Layout) -> list[str]:
    """Return what a file says that LightLM does not compute; a key that no one placed counts."""
    prefix = f"{layout.architecture}."
    latent = layout.fixed["attention"] == "mla"
    repeated, harmless = ({}, (*HARMLESS, *ABSORBED)) if latent else (REPEATED, HARMLESS)
    known = {*layout.keys.values(), *layout.constants, *layout.defaults, *repeated, *harmless}
    found = []
    for full, value in header.metadata.items():
        key = full.removeprefix(prefix)
        if not full.startswith(prefix):
            continue
        if key not in known or isinstance(value, (list, np.ndarray)):
            found.append(f"{full} is {str(value)[:40]!r}, which it does not compute")
        elif key in layout.constants and value not in layout.constants[key]:
            found.append(f"{full} is {value!r}, must be {' or '.join(map(repr, layout.constants[key]))}")
        elif (other := repeated.get(key)) and str(value) != str(header.metadata.get(prefix + other, value)):
            found.append(f"{full} is {value}, must be {prefix}{other}, {header.metadata[prefix + other]}")
    return found
