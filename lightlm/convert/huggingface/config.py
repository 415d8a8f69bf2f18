"""A model's shape as a Hugging Face config.json, by the tables in `layouts`. Imports nothing heavy."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from lightlm import files
from lightlm.convert.huggingface.layouts import LAYOUTS, MISSING_PARTS
from lightlm.convert.layouts import Layout
from lightlm.errors import ConvertError
from lightlm.model.config import BIASED, EXPERT_FIELDS, ModelConfig

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Kinds of rotary scaling by their `rope_type`: ModelConfig field -> their key.
_SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_seq_len": "original_max_position_embeddings",
    },
}
# ModelConfig field -> the type that its value must have, in words for messages.
_WORDS = {int: (int, "a whole number"), float: (int | float, "a number"), bool: (bool, "true or false")}
_KINDS = {field.name: _WORDS[field.type] for field in fields(ModelConfig) if field.type in _WORDS}


def write_config(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Return the shape part of a config.json that transformers 4.56 and 5 both read."""
    layout = LAYOUTS[model_type]
    values: dict[str, Any] = {"architectures": [layout.architecture], "model_type": model_type}
    values |= {theirs: getattr(config, ours) for ours, theirs in layout.keys.items()}
    values[layout.keys["num_layers"]] = config.depth
    for ours in ("norm_eps", "routed_scaling_factor"):
        if ours in layout.keys:
            values[layout.keys[ours]] = float(getattr(config, ours))
    values[layout.keys["init_std"]] = min(float(config.init_std), 1.0)  # LlamaConfig refuses more
    values |= {key: allowed[0] for key, allowed in layout.constants.items()}
    values |= {key: names[getattr(config, ours)][0] for ours, (key, names) in layout.choices.items()}
    values |= {key: config.has_bias(parts[0]) for key, parts in layout.bias_keys.items()}
    dense_layers = config.first_k_dense * config.layer_sharing
    if "first_k_dense_replace" in values:
        values["first_k_dense_replace"] = dense_layers
    if config.attention == "mla":
        values |= {"q_lora_rank": config.q_lora_rank or None}
        if not config.num_experts:  # experts that no layer has, in numbers that the class accepts
            values |= {"first_k_dense_replace": config.depth, "n_routed_experts": 2, "n_shared_experts": 1}
            values |= {"num_experts_per_tok": 2, "moe_intermediate_size": config.intermediate_size}
    if "mlp_only_layers" in values:
        values["mlp_only_layers"] = list(range(dense_layers))
    if layout.layer_types:
        values["layer_types"] = ["full_attention"] * config.depth
    if config.position == "rope":
        rope = {"rope_theta": float(config.rope_theta)}
        if "partial_rotary_factor" in layout.rope:
            rope["partial_rotary_factor"] = 1.0
        # At the top for transformers 4 and most other tools, nested for transformers 5.
        rope_type = "default" if config.rope_scaling == "none" else config.rope_scaling
        scaling = {"rope_type": rope_type}
        scaling |= {theirs: getattr(config, ours) for ours, theirs in _SCALINGS[rope_type].items()}
        values |= {**rope, "rope_parameters": {**scaling, **rope}}
        if rope_type != "default":
            values["rope_scaling"] = scaling  # for transformers 4; 5 takes it, too
    values |= {other: values[key] for key, other in layout.aliases.items()}
    if config.num_experts and (config.hidden_size % 8 or config.moe_intermediate_size % 8):
        # The grouped products that transformers 5 defaults to refuse rows that are not whole 16 bytes.
        values["experts_implementation"] = "eager"
    return values | layout.written


def read_config(values: dict[str, Any], where: str) -> tuple[str, ModelConfig]:
    """Return the model type and the shape that a config.json describes; `where` is its path, for messages.

    Raises:
        ConvertError: LightLM does not have such a model; the message lists every key in the way.
    """
    model_type = str(values.get("model_type"))
    if model_type not in LAYOUTS:
        reason = f", which LightLM does not have: {MISSING_PARTS[model_type]}" if model_type in MISSING_PARTS else ""
        raise ConvertError(
            f"{where}: model_type is {model_type!r}{reason}; LightLM reads {', '.join(sorted(LAYOUTS))} (without "
            "quantization), and its own checkpoints"
        )
    layout = LAYOUTS[model_type]
    values = {key: values[other] for key, other in layout.aliases.items() if other in values} | values
    rope_settings, rope_problems = _read_rope(layout, values) if layout.fixed["position"] == "rope" else ({}, [])
    # null means the class's default, which is also ours: num_heads, hidden_size / num_heads, 4 x hidden_size.
    given: dict[str, Any] = {key: 0 if value is None else value for key, value in (layout.defaults | values).items()}
    problems = [f"{theirs} is missing" for theirs in layout.keys.values() if theirs not in given]
    if problems := problems + rope_problems + _problems(layout, values):
        raise ConvertError(f"{where} describes a model LightLM does not have: {'; '.join(problems)}")
    settings = {ours: given[theirs] for ours, theirs in layout.keys.items()}
    if isinstance(settings.get("first_k_dense"), list):
        settings["first_k_dense"] = len(settings["first_k_dense"])
    settings |= rope_settings
    if layout.fixed["attention"] == "mla" and _is_at_least(settings["first_k_dense"], settings["num_layers"]):
        dense = {*settings} & {"num_experts", *EXPERT_FIELDS}
        settings |= {name: getattr(ModelConfig, name) for name in dense}
    for ours, (theirs, names) in layout.choices.items():
        said = values.get(theirs, next(iter(names.values()))[0])
        settings[ours] = next(value for value, known in names.items() if said in known)
    if layout.bias_keys:
        biased = {part for key, parts in layout.bias_keys.items() if values.get(key) for part in parts}
        settings["bias"] = bool(biased)
        if biased:  # every choice among these keys is one of `bias_in`
            settings["bias_in"] = next(name for name in BIASED if {*BIASED[name]} - {"norm"} == biased)
    for name, value in settings.items():
        kind, words = _KINDS.get(name, (str, "a text"))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            key = layout.keys.get(name, name)
            raise ConvertError(f"{where} does not describe a model: {key} is {str(value)[:60]!r}, not {words}")
    try:
        return model_type, ModelConfig(**settings, **layout.fixed).resolved()
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{where} does not describe a model: {error}") from None


def _is_at_least(value: Any, least: Any) -> bool:
    return isinstance(value, int) and isinstance(least, int) and value >= least


def _read_rope(layout: Layout, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the `ROPE_FIELDS` that a config.json sets, and what it says that LightLM does not compute."""
    # Both may be there. transformers takes `rope_scaling` then, and adds what it lacks from the top.
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    nested = values.get(key) or {}
    if not isinstance(nested, dict) or any(isinstance(value, dict) for value in nested.values()):
        return {}, [f"{key} is {str(nested)[:60]!r}, must be the same settings for every layer"]
    rope = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, "type": "default", "rope_type": None}
    rope |= {key: value for key, value in (layout.rope | values | nested).items() if key in rope}
    rope_type = rope["rope_type"] or rope["type"]
    if not isinstance(rope_type, str) or rope_type not in _SCALINGS:
        known = ", ".join(map(repr, _SCALINGS))
        return {}, [f"{key} has rope_type {rope_type!r}, which LightLM does not compute; it computes {known}"]
    problems = []
    if rope["partial_rotary_factor"] != 1.0:
        problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, must be 1.0")
    if layout.fixed["attention"] == "mla" and rope_type != "default" and nested.get("mscale_all_dim"):
        problems.append(f"{key} has mscale_all_dim {nested['mscale_all_dim']!r}, a factor on scores, must be 0")
    defaults = {"original_max_position_embeddings": values.get("max_position_embeddings")}
    if values.get("original_max_position_embeddings"):  # transformers prefers it
        nested = nested | {"original_max_position_embeddings": values["original_max_position_embeddings"]}
    settings = {"rope_theta": rope["rope_theta"], "rope_scaling": "none" if rope_type == "default" else rope_type}
    for ours, theirs in _SCALINGS[rope_type].items():
        settings[ours] = (defaults | nested).get(theirs)
        if settings[ours] is None:
            problems.append(f"{key} has no {theirs}, which rope_type {rope_type!r} needs")
    return settings, problems


def _problems(layout: Layout, values: dict[str, Any]) -> list[str]:
    """Return what a config.json says that LightLM does not compute."""
    problems = []
    for key, allowed in layout.constants.items():
        value = values.get(key, layout.defaults.get(key, allowed[0]))
        if value not in allowed:
            said = "is" if key in values else "is missing, which means"
            problems.append(f"{key} {said} {value!r}, must be {' or '.join(map(repr, allowed))}")
    for key, names in layout.choices.values():
        known = [name for each in names.values() for name in each]
        if values.get(key, known[0]) not in known:
            problems.append(f"{key} is {values[key]!r}, must be {' or '.join(map(repr, known))}")
    problems += [
        f"{key} is {values[key]!r}, must be true or false"
        for key in layout.bias_keys
        if not isinstance(values.get(key, False), bool)
    ]
    windows = {
        "mistral": 4096,
        "mixtral": None,
        "starcoder2": None,
    }  # what a missing key means; other classes ignore the key
    model_type = values["model_type"]
    window = values.get("sliding_window", windows[model_type]) if model_type in windows else None
    positions = values.get("max_position_embeddings", 0)
    if window is not None and not (isinstance(window, int) and isinstance(positions, int) and window >= positions):
        problems.append(f"sliding_window is {window!r}, must be null or at least max_position_embeddings")
    kinds = values.get("layer_types") or layout.layer_types
    if banded := sorted(
        {str(kind) for kind in (kinds if isinstance(kinds, list | tuple) else [kinds])} - {"full_attention"}
    ):
        problems.append(f"layer_types has {', '.join(banded)}, must be full_attention throughout")
    dense = values.get("mlp_only_layers") or []
    if "mlp_only_layers" in layout.defaults and (not isinstance(dense, list) or dense != list(range(len(dense)))):
        problems.append(f"mlp_only_layers is {dense!r}, must be the first layers without a gap")
    rotary = values.get("qk_rope_head_dim", layout.defaults.get("qk_rope_head_dim"))
    if layout.fixed["attention"] == "mla" and values.get("head_dim", rotary) != rotary:  # the width that it rotates
        problems.append(f"head_dim is {values['head_dim']!r}, must be qk_rope_head_dim, {rotary!r}")
    if values.get("is_causal", True) is not True:
        problems.append(f"is_causal is {values['is_causal']!r}, must be true")
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        problems.append(f"quantization_config has quant_method {method!r}; export full-precision weights first")
    return problems


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no file; raise ConvertError if it is damaged."""
    return files.read_object(path, ConvertError, optional=True)
