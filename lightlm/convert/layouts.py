"""How each Hugging Face class names its settings and its weights: one table a class, read in both directions.

Imports nothing heavy, like `registry`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig


@dataclass(frozen=True)
class Link:
    """One of their modules and ours that hold the same weights; `{}` stands for the layer."""

    theirs: str
    ours: tuple[str, ...]  # more than one: theirs is these, concatenated along the output
    transposed: bool = False  # GPT-2's Conv1D stores its weight (input, output)


@dataclass(frozen=True)
class Layout:
    """A Hugging Face class as a set of names."""

    architecture: str
    base: str  # prefix of all weights but the head's; files saved from the bare model lack it
    keys: dict[str, str]  # ModelConfig field -> their key
    fixed: dict[str, Any]  # ModelConfig fields that every model of this class has
    defaults: dict[str, Any]  # their keys that may be missing (written by an older version), and what that means
    constants: dict[str, tuple[Any, ...]]  # their keys that must hold one of these; the first is meant when missing
    links: tuple[Link, ...]
    bias_keys: tuple[str, ...] = ()  # their keys for ModelConfig.bias, where the class leaves the choice
    written: dict[str, Any] = field(default_factory=dict)  # further keys of an exported config.json

    @property
    def has_rope(self) -> bool:
        return self.fixed["position"] == "rope"


_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_LLAMA_FIXED = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": False}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_LLAMA_LINKS = (
    Link("model.embed_tokens", ("embed_tokens",)),
    Link("model.layers.{}.input_layernorm", ("blocks.{}.attention_norm",)),
    Link("model.layers.{}.self_attn.q_proj", ("blocks.{}.attention.q_proj",)),
    Link("model.layers.{}.self_attn.k_proj", ("blocks.{}.attention.k_proj",)),
    Link("model.layers.{}.self_attn.v_proj", ("blocks.{}.attention.v_proj",)),
    Link("model.layers.{}.self_attn.o_proj", ("blocks.{}.attention.o_proj",)),
    Link("model.layers.{}.self_attn.q_norm", ("blocks.{}.attention.q_norm",)),
    Link("model.layers.{}.self_attn.k_norm", ("blocks.{}.attention.k_norm",)),
    Link("model.layers.{}.post_attention_layernorm", ("blocks.{}.mlp_norm",)),
    Link("model.layers.{}.mlp.gate_proj", ("blocks.{}.mlp.gate_proj",)),
    Link("model.layers.{}.mlp.up_proj", ("blocks.{}.mlp.up_proj",)),
    Link("model.layers.{}.mlp.down_proj", ("blocks.{}.mlp.down_proj",)),
    Link("model.norm", ("norm",)),
    Link("lm_head", ("lm_head",)),
)
_GPT2_QKV = ("blocks.{}.attention.q_proj", "blocks.{}.attention.k_proj", "blocks.{}.attention.v_proj")

LAYOUTS = {
    "gpt2": Layout(
        architecture="GPT2LMHeadModel",
        base="transformer.",
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "max_seq_len": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
            "init_std": "initializer_range",
        },
        fixed={"norm": "layernorm", "position": "learned", "mlp": "gelu", "qk_norm": False, "bias": True},
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
        },
        constants={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        links=(
            Link("transformer.wte", ("embed_tokens",)),
            Link("transformer.wpe", ("embed_positions",)),
            Link("transformer.h.{}.ln_1", ("blocks.{}.attention_norm",)),
            Link("transformer.h.{}.attn.c_attn", _GPT2_QKV, transposed=True),
            Link("transformer.h.{}.attn.c_proj", ("blocks.{}.attention.o_proj",), transposed=True),
            Link("transformer.h.{}.ln_2", ("blocks.{}.mlp_norm",)),
            Link("transformer.h.{}.mlp.c_fc", ("blocks.{}.mlp.up_proj",), transposed=True),
            Link("transformer.h.{}.mlp.c_proj", ("blocks.{}.mlp.down_proj",), transposed=True),
            Link("transformer.ln_f", ("norm",)),
            Link("lm_head", ("lm_head",)),
        ),
        written={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},  # else training it further would drop out
    ),
    "llama": Layout(
        architecture="LlamaForCausalLM",
        base="model.",
        keys=_LLAMA_KEYS,
        fixed=_LLAMA_FIXED,
        defaults=_LLAMA_DEFAULTS,
        constants={"hidden_act": ("silu",)},
        links=_LLAMA_LINKS,
        bias_keys=("attention_bias", "mlp_bias"),
    ),
    "mistral": Layout(  # read only: without its window it is a Llama
        architecture="MistralForCausalLM",
        base="model.",
        keys=_LLAMA_KEYS,
        fixed={**_LLAMA_FIXED, "bias": False},
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 8},
        constants={"hidden_act": ("silu",)},
        links=_LLAMA_LINKS,
    ),
    "qwen3": Layout(
        architecture="Qwen3ForCausalLM",
        base="model.",
        keys=_LLAMA_KEYS,
        fixed={**_LLAMA_FIXED, "qk_norm": True, "bias": False},
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
        constants={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
        links=_LLAMA_LINKS,
    ),
}


def layer_links(layout: Layout, depth: int, repeats: int = 1) -> Iterator[Link]:
    """Every link of a model of `depth` layers with the layers' numbers put in; block i is their layers
    i x repeats to (i + 1) x repeats - 1."""
    for link in layout.links:
        if "{}" not in link.theirs:
            yield link
            continue
        for layer in range(depth):
            ours = tuple(name.format(layer // repeats) for name in link.ours)
            yield Link(link.theirs.format(layer), ours, link.transposed)


def write_config(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """The shape part of a config.json, as transformers 4.56 and 5 both read it."""
    layout = LAYOUTS[model_type]
    values: dict[str, Any] = {"architectures": [layout.architecture], "model_type": model_type}
    values |= {theirs: getattr(config, ours) for ours, theirs in layout.keys.items()}
    values[layout.keys["num_layers"]] = config.depth
    values[layout.keys["norm_eps"]] = float(config.norm_eps)
    values[layout.keys["init_std"]] = min(float(config.init_std), 1.0)  # more is refused there; nothing depends on it
    values |= {key: allowed[0] for key, allowed in layout.constants.items()}
    values |= dict.fromkeys(layout.bias_keys, config.bias)
    if layout.has_rope:
        theta = float(config.rope_theta)
        values["rope_theta"] = theta  # read by transformers 4 and most other tools
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}  # read by transformers 5
    return values | layout.written


def read_config(values: dict[str, Any], where: str) -> tuple[str, ModelConfig]:
    """The model type and the shape that a config.json describes.

    Raises:
        ConvertError: LightLM has no such model; the message lists every key in the way.
    """
    model_type = values.get("model_type")
    if model_type not in LAYOUTS:
        raise ConvertError(
            f"{where}: model_type is {model_type!r}; LightLM reads {', '.join(sorted(LAYOUTS))} (dense models without "
            "quantisation), and its own checkpoints"
        )
    layout = LAYOUTS[model_type]
    rope = _rope_settings(values) if layout.has_rope else {}
    problems = [
        f"{theirs} is missing" for theirs in layout.keys.values() if theirs not in values | layout.defaults
    ] + _problems(layout, model_type, values, rope)
    if problems:
        raise ConvertError(f"{where} describes a model LightLM does not have: {'; '.join(problems)}")
    settings: dict[str, Any] = {
        ours: values.get(theirs, layout.defaults.get(theirs)) for ours, theirs in layout.keys.items()
    }
    # null leaves the size to the class's rule, which is ours too: num_heads, hidden_size / num_heads, 4 x hidden_size.
    settings = {ours: 0 if value is None else value for ours, value in settings.items()}
    if layout.bias_keys:
        settings["bias"] = values.get(layout.bias_keys[0], False)
    if layout.has_rope:
        settings["rope_theta"] = rope["rope_theta"]
    try:
        return model_type, ModelConfig(**settings, **layout.fixed).resolved()
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{where} does not describe a model: {error}") from None


def _rope_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Type, base and rotated share of the rotary embedding, wherever a version of transformers put them."""
    nested = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return {
        "rope_type": nested.get("rope_type", nested.get("type", "default")),
        "rope_theta": nested.get("rope_theta", values.get("rope_theta", 10_000.0)),
        "partial_rotary_factor": nested.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)),
    }


def _problems(layout: Layout, model_type: str, values: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    problems = []
    for key, allowed in layout.constants.items():
        if (value := values.get(key, allowed[0])) not in allowed:
            problems.append(f"{key} is {value!r}, must be {' or '.join(repr(one) for one in allowed)}")
    biases = {key: values.get(key, False) for key in layout.bias_keys}
    if len(set(biases.values())) > 1:
        problems.append(" and ".join(f"{key} is {value!r}" for key, value in biases.items()) + ", must be equal")
    if rope.get("rope_type", "default") != "default":
        key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
        problems.append(f"{key} has rope_type {rope['rope_type']!r}, must be 'default' (positions unscaled)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, must be 1.0")
    window = values.get("sliding_window", 4096) if model_type == "mistral" else None
    if window is not None and window < values.get("max_position_embeddings", 0):
        problems.append(f"sliding_window is {window!r}, must be null or at least max_position_embeddings")
    if banded := sorted(set(values.get("layer_types") or ()) - {"full_attention"}):
        problems.append(f"layer_types has {', '.join(banded)}, must be full_attention throughout")
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        problems.append(f"quantization_config has quant_method {method!r}; export full-precision weights first")
    return problems
