"""How each Hugging Face class names its settings and its weights: one table a class, read in both directions.

Imports nothing heavy, like `registry`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

SELECTION_BIAS = "e_score_correction_bias"  # of sigmoid routers: a buffer, fp32 in every file


@dataclass(frozen=True)
class Link:
    """One of their modules and ours that hold the same weights, or one tensor by its full name.

    `{}` stands for the layer, `*` for the expert: ours are stacked in one tensor, theirs have a name each.
    """

    theirs: str
    ours: tuple[str, ...]  # more than one: theirs is these, concatenated along the output
    transposed: bool = False  # GPT-2's Conv1D stores its weight (input, output)

    @property
    def by_expert(self) -> bool:
        return "*" in self.theirs


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
    rope: dict[str, float] = field(default_factory=dict)  # rotary settings where config.json has none
    aliases: dict[str, str] = field(default_factory=dict)  # key -> its name in another version of transformers
    stacked_links: tuple[Link, ...] = ()  # names where experts lie stacked on disk (save_original_format=False)

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
_MOE_KEYS = {
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}
_MOE_FIXED = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
_EXPERT_LINKS = (
    Link("model.layers.{}.mlp.gate", ("blocks.{}.mlp.router",)),
    Link("model.layers.{}.mlp.experts.*.gate_proj.weight", ("blocks.{}.mlp.experts.gate_proj",)),
    Link("model.layers.{}.mlp.experts.*.up_proj.weight", ("blocks.{}.mlp.experts.up_proj",)),
    Link("model.layers.{}.mlp.experts.*.down_proj.weight", ("blocks.{}.mlp.experts.down_proj",)),
)
_STACKED_LINKS = (
    Link("model.layers.{}.mlp.gate", ("blocks.{}.mlp.router",)),
    Link(
        "model.layers.{}.mlp.experts.gate_up_proj",
        ("blocks.{}.mlp.experts.gate_proj", "blocks.{}.mlp.experts.up_proj"),
    ),
    Link("model.layers.{}.mlp.experts.down_proj", ("blocks.{}.mlp.experts.down_proj",)),
)
_GLM_LINKS = (
    *_LLAMA_LINKS,
    Link(f"model.layers.{{}}.mlp.gate.{SELECTION_BIAS}", ("blocks.{}.mlp.router.selection_bias",)),
    Link("model.layers.{}.mlp.shared_experts.gate_proj", ("blocks.{}.mlp.shared.gate_proj",)),
    Link("model.layers.{}.mlp.shared_experts.up_proj", ("blocks.{}.mlp.shared.up_proj",)),
    Link("model.layers.{}.mlp.shared_experts.down_proj", ("blocks.{}.mlp.shared.down_proj",)),
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
    "glm4_moe": Layout(
        architecture="Glm4MoeForCausalLM",
        base="model.",
        keys={
            **_LLAMA_KEYS,
            **_MOE_KEYS,
            "qk_norm": "use_qk_norm",
            "num_experts": "n_routed_experts",
            "num_shared_experts": "n_shared_experts",
            "first_k_dense": "first_k_dense_replace",
            "routed_scaling_factor": "routed_scaling_factor",
        },
        fixed={**_MOE_FIXED, "router": "sigmoid"},
        defaults={
            **_LLAMA_DEFAULTS,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "use_qk_norm": False,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        constants={"hidden_act": ("silu",), "attention_bias": (False,), "n_group": (1,), "topk_group": (1,)},
        links=_GLM_LINKS + _EXPERT_LINKS,
        stacked_links=_GLM_LINKS + _STACKED_LINKS,
        # Layers for speculative decoding. Read, the number says nothing: transformers writes 1 for models without any.
        written={"num_nextn_predict_layers": 0},
        rope={"partial_rotary_factor": 0.5},
    ),
    "qwen3_moe": Layout(
        architecture="Qwen3MoeForCausalLM",
        base="model.",
        keys={**_LLAMA_KEYS, **_MOE_KEYS, "num_experts": "num_experts", "first_k_dense": "mlp_only_layers"},
        fixed={**_MOE_FIXED, "router": "softmax", "qk_norm": True},
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 4, "norm_topk_prob": False, "mlp_only_layers": None},
        constants={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "use_sliding_window": (False,),
            "decoder_sparse_step": (1,),
        },
        links=_LLAMA_LINKS + _EXPERT_LINKS,
        stacked_links=_LLAMA_LINKS + _STACKED_LINKS,
        aliases={"num_experts": "num_local_experts"},  # transformers 4 and 5
    ),
    "mixtral": Layout(
        architecture="MixtralForCausalLM",
        base="model.",
        keys={
            **{ours: theirs for ours, theirs in _LLAMA_KEYS.items() if ours != "intermediate_size"},
            "num_experts": "num_local_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "moe_intermediate_size": "intermediate_size",
        },
        fixed={**_MOE_FIXED, "router": "softmax", "qk_norm": False},
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        constants={"hidden_act": ("silu",)},
        links=(
            *_LLAMA_LINKS,
            Link("model.layers.{}.block_sparse_moe.gate", ("blocks.{}.mlp.router",)),
            Link("model.layers.{}.block_sparse_moe.experts.*.w1.weight", ("blocks.{}.mlp.experts.gate_proj",)),
            Link("model.layers.{}.block_sparse_moe.experts.*.w3.weight", ("blocks.{}.mlp.experts.up_proj",)),
            Link("model.layers.{}.block_sparse_moe.experts.*.w2.weight", ("blocks.{}.mlp.experts.down_proj",)),
        ),
        stacked_links=_LLAMA_LINKS + _STACKED_LINKS,
        rope={"rope_theta": 1_000_000.0},
    ),
}


def layer_links(links: Iterable[Link], depth: int, repeats: int = 1) -> Iterator[Link]:
    """These links of a model of `depth` layers with the layers' numbers put in; block i is their layers
    i x repeats to (i + 1) x repeats - 1."""
    for link in links:
        if "{}" not in link.theirs:
            yield link
            continue
        for layer in range(depth):
            ours = tuple(name.format(layer // repeats) for name in link.ours)
            yield replace(link, theirs=link.theirs.format(layer), ours=ours)
