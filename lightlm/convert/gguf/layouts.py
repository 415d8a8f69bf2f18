"""How each architecture of llama.cpp names its settings and its weights: one layout per kind of model.

A file names its architecture in `general.architecture`, and its settings as `ARCHITECTURE.KEY`. `keys` are those KEYs.
Imports nothing heavy.
"""

from dataclasses import replace

from lightlm.convert.huggingface.layouts import LAYOUTS as CLASSES
from lightlm.convert.layouts import Layout, Link, Rule, nearest_layout
from lightlm.model.config import LATENT_NORM_EPS, ModelConfig

# Keys that repeat another one.
REPEATED = {"attention.value_length": "attention.key_length", "rope.dimension_count": "attention.key_length"}
GATING = {"softmax": 1, "sigmoid": 2}  # the values of expert_gating_func
# Keys that say nothing about the shape, or what other keys and the tensors say too.
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "attention.causal")
# The cache of absorbed latents, which follows from other keys.
ABSORBED = ("attention.key_length", "attention.value_length")

_ANY = Rule(lambda c: True)
_UNSCALED_ROPE = Rule(lambda c: c.rope_scaling != "llama3", "must be none or linear")
# llama.cpp reads the divisors of frequencies, a tensor, in these only.
_SCALED_ROPE = {"rope_scaling": _ANY}
_RULES = {
    **CLASSES["qwen3"].rules,
    "rope_scaling": _UNSCALED_ROPE,
    "vocab_size": _ANY,  # the rows of the token table
    "tie_embeddings": _ANY,  # whether the file has `output.weight`
    "init_std": _ANY,  # `lightlm.init_std`
}
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "max_seq_len": "context_length",
}
_LLAMA_KEYS = {
    **_KEYS,
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_EXPERT_KEYS = {**_LLAMA_KEYS, "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_SIGMOID_KEYS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_shared_experts": "expert_shared_count",
    "first_k_dense": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "router": "expert_gating_func",
}
_SIGMOID_DEFAULTS = {"leading_dense_block_count": 0, "expert_weights_scale": 1.0, "expert_weights_norm": False}
_DENSE = {"expert_count": (0,), "expert_used_count": (0,)}
_ROPE_TYPES = {"rope.scaling.type": ("none", "linear")}

# Of latent attention.
_LATENTS = "blocks.{}.attention."
_LATENT_SHARED = ("blk.{}.attn_norm", "blk.{}.attn_q", "blk.{}.attn_output")
_LATENT_CONSTANTS = {
    "attention.head_count_kv": (1,),  # files with more have keys and values in one tensor, which is not read
    **dict.fromkeys(("expert_group_count", "expert_group_used_count"), (1,)),
    "nextn_predict_layers": (0,),
}
_LITE_DEPTHS = (26, 27, 48)

_ENDS = (
    Link("token_embd", "embed_tokens"),
    Link("output_norm", "norm"),
    Link("output", "lm_head"),
)
_ATTENTION_LINKS = (
    Link("blk.{}.attn_norm", "blocks.{}.attention_norm"),
    Link("blk.{}.attn_q", "blocks.{}.attention.q_proj"),
    Link("blk.{}.attn_k", "blocks.{}.attention.k_proj"),
    Link("blk.{}.attn_v", "blocks.{}.attention.v_proj"),
    Link("blk.{}.attn_output", "blocks.{}.attention.o_proj"),
    Link("blk.{}.attn_q_norm", "blocks.{}.attention.q_norm"),
    Link("blk.{}.attn_k_norm", "blocks.{}.attention.k_norm"),
)
_NETWORKS = ("gate", "up", "down")
_DENSE_LINKS = tuple(Link(f"blk.{{}}.ffn_{name}", f"blocks.{{}}.mlp.{name}_proj") for name in _NETWORKS)
_EXPERT_LINKS = (
    Link("blk.{}.ffn_gate_inp", "blocks.{}.mlp.router"),
    *(Link(f"blk.{{}}.ffn_{name}_exps.weight", f"blocks.{{}}.mlp.experts.{name}_proj") for name in _NETWORKS),
)
_SIGMOID_LINKS = (
    Link("blk.{}.exp_probs_b.bias", "blocks.{}.mlp.router.selection_bias"),
    *(Link(f"blk.{{}}.ffn_{name}_shexp", f"blocks.{{}}.mlp.shared.{name}_proj") for name in _NETWORKS),
)
_MLP_NORM = Link("blk.{}.ffn_norm", "blocks.{}.mlp_norm")
_LLAMA_LINKS = (*_ENDS, *_ATTENTION_LINKS, _MLP_NORM, *_DENSE_LINKS)

_LLAMA = Layout(
    architecture="llama",
    base="",
    keys=_LLAMA_KEYS,
    fixed=CLASSES["llama"].fixed,
    rules={**_RULES, **_SCALED_ROPE, "bias": _ANY, "bias_in": _ANY},  # whether the file has biases
    defaults={
        "attention.head_count_kv": 0,
        "attention.key_length": 0,
        "rope.freq_base": 10_000.0,
        "rope.scaling.factor": 1.0,
    },
    constants={**_DENSE, **_ROPE_TYPES},
    links=_LLAMA_LINKS,
    neighboring_pairs=True,
)

# `gguf_layout` takes the first that expresses a configuration.
LAYOUTS = {
    "gpt2": Layout(
        architecture="gpt2",
        base="",
        keys={**_KEYS, "norm_eps": "attention.layer_norm_epsilon"},
        fixed={**CLASSES["gpt2"].fixed, "mlp": "gelu"},
        rules={**CLASSES["gpt2"].rules, **_RULES, **_SCALED_ROPE},  # without effect
        defaults={},
        constants=_DENSE,
        links=(
            *_ENDS,
            Link("position_embd", "embed_positions"),
            Link("blk.{}.attn_norm", "blocks.{}.attention_norm"),
            Link(
                "blk.{}.attn_qkv",
                "blocks.{}.attention.q_proj blocks.{}.attention.k_proj blocks.{}.attention.v_proj",
            ),
            Link("blk.{}.attn_output", "blocks.{}.attention.o_proj"),
            _MLP_NORM,
            *_DENSE_LINKS,
        ),
    ),
    "qwen2": replace(
        _LLAMA,
        architecture="qwen2",
        fixed=CLASSES["qwen2"].fixed,
        rules={**_RULES, "bias_in": CLASSES["qwen2"].rules["bias_in"]},
        neighboring_pairs=False,
    ),
    "llama": _LLAMA,
    "qwen3": replace(
        _LLAMA,
        architecture="qwen3",
        fixed=CLASSES["qwen3"].fixed,
        rules=_RULES,
        neighboring_pairs=False,
    ),
    "qwen3moe": Layout(
        architecture="qwen3moe",
        base="",
        keys={**_EXPERT_KEYS, "moe_intermediate_size": "expert_feed_forward_length"},
        # llama.cpp gives this architecture no dense layers, and always makes the weights of experts sum to 1.
        fixed={**CLASSES["qwen3_moe"].fixed, "norm_topk_prob": True, "first_k_dense": 0},
        rules={**CLASSES["qwen3_moe"].rules, **_RULES, "intermediate_size": _ANY},  # no dense layer has it
        defaults=_LLAMA.defaults,
        constants=_ROPE_TYPES,
        links=(*_ENDS, *_ATTENTION_LINKS, _MLP_NORM, *_EXPERT_LINKS),
    ),
    "mixtral": Layout(
        architecture="llama",
        base="",
        keys={
            **{ours: theirs for ours, theirs in _EXPERT_KEYS.items() if ours != "intermediate_size"},
            "moe_intermediate_size": "feed_forward_length",
        },
        fixed=CLASSES["mixtral"].fixed,
        rules={**CLASSES["mixtral"].rules, **_RULES, **_SCALED_ROPE},
        defaults=_LLAMA.defaults,
        constants=_ROPE_TYPES,
        links=(*_ENDS, *_ATTENTION_LINKS, _MLP_NORM, *_EXPERT_LINKS),
        neighboring_pairs=True,
    ),
    # The most general: either router, norms of queries and keys or not, dense layers at the start, shared experts.
    "glm4moe": Layout(
        architecture="glm4moe",
        base="",
        keys={
            **_EXPERT_KEYS,
            **_SIGMOID_KEYS,
        },
        fixed={key: value for key, value in CLASSES["glm4_moe"].fixed.items() if key != "router"},
        rules={**CLASSES["glm4_moe"].rules, **_RULES, "qk_norm": _ANY},  # whether the file has these norms
        defaults={
            **_LLAMA.defaults,
            **_SIGMOID_DEFAULTS,
            "expert_gating_func": GATING["sigmoid"],
        },
        constants={**_ROPE_TYPES, "nextn_predict_layers": (0,)},
        links=(
            *_ENDS,
            *_ATTENTION_LINKS,
            Link("blk.{}.post_attention_norm", "blocks.{}.mlp_norm"),
            *_DENSE_LINKS,
            *_EXPERT_LINKS,
            *_SIGMOID_LINKS,
        ),
    ),
    # DeepSeek-V2 and V3, absorbed: keys are latents beside rotary keys, which all heads share.
    "deepseek2": Layout(
        architecture="deepseek2",
        base="",
        keys={
            **{ours: theirs for ours, theirs in _EXPERT_KEYS.items() if ours != "num_kv_heads"},
            **_SIGMOID_KEYS,
            "head_dim": "attention.key_length_mla",
            "v_head_dim": "attention.value_length_mla",
            "qk_rope_head_dim": "rope.dimension_count",
            "kv_lora_rank": "attention.kv_lora_rank",
            "q_lora_rank": "attention.q_lora_rank",
        },
        fixed={key: value for key, value in CLASSES["deepseek_v3"].fixed.items() if key != "router"},
        rules={
            **_RULES,
            "num_kv_heads": _ANY,  # num_heads
            "qk_nope_head_dim": _ANY,  # key_length_mla without the rotary part
            "norm_eps": Rule(lambda c: c.norm_eps == LATENT_NORM_EPS, "must be 1e-6, that of the latents' norms"),
            # It multiplies scores by a factor of YaRN for any scaling.
            "rope_scaling": Rule(lambda c: c.rope_scaling == "none", "must be none"),
            "q_lora_rank": Rule(
                lambda c: not c.q_lora_rank or c.depth not in _LITE_DEPTHS,
                "must be 0 with 26, 27 or 48 layers, which llama.cpp takes for DeepSeek-V2-Lite and its like",
            ),
        },
        defaults={**_SIGMOID_DEFAULTS, "expert_gating_func": GATING["softmax"], "rope.freq_base": 10_000.0}
        | {"expert_count": 0, "expert_used_count": 0, "attention.q_lora_rank": 0},
        constants={**_ROPE_TYPES, **_LATENT_CONSTANTS},
        links=(
            *_ENDS,
            *(link for link in _ATTENTION_LINKS if link.theirs in _LATENT_SHARED),
            Link("blk.{}.attn_q_a", f"{_LATENTS}q_a_proj"),
            Link("blk.{}.attn_q_a_norm", f"{_LATENTS}q_a_norm"),
            Link("blk.{}.attn_q_b", f"{_LATENTS}q_b_proj"),
            Link("blk.{}.attn_kv_a_mqa", f"{_LATENTS}kv_a_proj {_LATENTS}k_rope_proj"),
            Link("blk.{}.attn_kv_a_norm", f"{_LATENTS}kv_a_norm"),
            Link("blk.{}.attn_k_b", f"{_LATENTS}k_b_proj"),
            Link("blk.{}.attn_v_b", f"{_LATENTS}v_b_proj"),
            _MLP_NORM,
            *_DENSE_LINKS,
            *_EXPERT_LINKS,
            *_SIGMOID_LINKS,
        ),
        neighboring_pairs=True,
    ),
}


def gguf_layout(config: ModelConfig) -> tuple[str, str]:
    """Return the layout that a configuration exports to and an empty text, or the nearest one and why it cannot."""
    nearest, obstacles = nearest_layout(LAYOUTS, config)
    architecture = LAYOUTS[nearest].architecture
    refusal = f"llama.cpp's {architecture}, its nearest architecture, cannot have {obstacles}" if obstacles else ""
    return nearest, refusal
