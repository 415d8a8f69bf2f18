"""How each Hugging Face class names its settings and its weights: one layout per class.

Place a new field in `keys` of the classes that have it, and in `_RULES` if none does. Fields that fold
(`ModelConfig.folded`) need no place: an export folds them into plain weights first.

Imports nothing heavy: `train` and `recipes` ask for the `export_target` when they read a recipe.
"""

from dataclasses import dataclass, replace

from lightlm.convert.layouts import Layout, Link, Rule, nearest_layout
from lightlm.model.config import EXPERT_FIELDS, LATENT_FIELDS, ROPE_FIELDS, ModelConfig

SELECTION_BIAS = "e_score_correction_bias"  # a buffer of sigmoid routers, fp32 in every file


def _sees_everything(config: ModelConfig) -> bool:
    return not any(0 < config.window(layer) < config.max_seq_len for layer in range(config.depth))


_ANY = Rule(lambda c: True)
_RULES = {
    "layer_sharing": _ANY,  # repeated blocks are written as layers of their own
    "sliding_window": Rule(_sees_everything, "every layer must see all positions"),
    "full_attention_interval": _ANY,  # only matters with sliding_window
    "bias_in": Rule(lambda c: not c.bias or c.bias_in == "all", "must be all"),
    **dict.fromkeys(LATENT_FIELDS, _ANY),  # only matter with attention: mla
    **dict.fromkeys(ROPE_FIELDS, _ANY),  # written by `write_config` where positions are rotary, else without effect
}
_NO_EXPERTS = {name: getattr(ModelConfig, name) for name in ("num_experts", *EXPERT_FIELDS)}  # the defaults

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
_LLAMA_FIXED = {
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "attention": "gqa",
    "qk_norm": False,
    "attention_gate": False,
    **_NO_EXPERTS,
}
# LlamaConfig checks it since transformers 5, though the class itself only needs head_dim.
_LLAMA_RULES = {
    **_RULES,
    "num_heads": Rule(lambda c: c.hidden_size % c.num_heads == 0, "must divide hidden_size: {hidden_size}"),
}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LLAMA_LINKS = (
    Link("model.embed_tokens", "embed_tokens"),
    Link("model.layers.{}.input_layernorm", "blocks.{}.attention_norm"),
    *(Link(f"model.layers.{{}}.self_attn.{name}", f"blocks.{{}}.attention.{name}") for name in _ATTENTION),
    Link("model.layers.{}.post_attention_layernorm", "blocks.{}.mlp_norm"),
    *(Link(f"model.layers.{{}}.mlp.{name}", f"blocks.{{}}.mlp.{name}") for name in _MLP),
    Link("model.norm", "norm"),
    Link("lm_head", "lm_head"),
)
_GATED_LINKS = tuple(
    replace(link, ours=f"{link.ours} blocks.{{}}.attention.gate_proj", by_head=True)
    if "q_proj" in link.theirs
    else link
    for link in _LLAMA_LINKS
)
_SIGMOID_LINKS = (
    Link(f"model.layers.{{}}.mlp.gate.{SELECTION_BIAS}", "blocks.{}.mlp.router.selection_bias"),
    *(Link(f"model.layers.{{}}.mlp.shared_experts.{name}", f"blocks.{{}}.mlp.shared.{name}") for name in _MLP),
)
_GLM_LINKS = _LLAMA_LINKS + _SIGMOID_LINKS
_LATENTS = "blocks.{}.attention."
_DEEPSEEK_LINKS = (
    *(
        link
        for link in _LLAMA_LINKS
        if not any(name in link.theirs for name in ("k_proj", "v_proj", "q_norm", "k_norm"))
    ),
    Link("model.layers.{}.self_attn.q_a_proj", f"{_LATENTS}q_a_proj"),
    Link("model.layers.{}.self_attn.q_a_layernorm", f"{_LATENTS}q_a_norm"),
    Link("model.layers.{}.self_attn.q_b_proj", f"{_LATENTS}q_b_proj"),
    Link("model.layers.{}.self_attn.kv_a_proj_with_mqa", f"{_LATENTS}kv_a_proj {_LATENTS}k_rope_proj"),
    Link("model.layers.{}.self_attn.kv_a_layernorm", f"{_LATENTS}kv_a_norm"),
    Link("model.layers.{}.self_attn.kv_b_proj", f"{_LATENTS}k_b_proj {_LATENTS}v_b_proj", by_head=True),
    *_SIGMOID_LINKS,
)
_ROUTER_LINK = Link("model.layers.{}.mlp.gate", "blocks.{}.mlp.router")
_EXPERT_LINKS = (
    _ROUTER_LINK,
    *(Link(f"model.layers.{{}}.mlp.experts.*.{name}.weight", f"blocks.{{}}.mlp.experts.{name}") for name in _MLP),
)
_STACKED_LINKS = (
    _ROUTER_LINK,
    Link("model.layers.{}.mlp.experts.gate_up_proj", "blocks.{}.mlp.experts.gate_proj blocks.{}.mlp.experts.up_proj"),
    Link("model.layers.{}.mlp.experts.down_proj", "blocks.{}.mlp.experts.down_proj"),
)
_MOE_KEYS = {name: name for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")}
_MOE_FIXED = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "attention_gate": False}
_MOE_FIXED |= {"attention": "gqa"}
_ONE_GROUP = {"n_group": (1,), "topk_group": (1,)}
_SIGMOID_HINT = "with router: sigmoid Glm4MoeForCausalLM has it"
_SOFTMAX_RULES = {
    **_RULES,
    "num_experts": Rule(lambda c: c.num_experts > 0, "must be at least 1"),
    "num_shared_experts": Rule(lambda c: c.num_shared_experts == 0, _SIGMOID_HINT),
    "routed_scaling_factor": Rule(lambda c: c.routed_scaling_factor == 1.0, _SIGMOID_HINT),
}
_LLAMA = Layout(
    architecture="LlamaForCausalLM",
    keys=_LLAMA_KEYS,
    fixed=_LLAMA_FIXED,
    rules={
        **_LLAMA_RULES,
        "bias": _ANY,
        "bias_in": Rule(lambda c: not c.bias or c.bias_in != "qkv", "must be all, attention or mlp"),
    },
    defaults=_LLAMA_DEFAULTS,
    constants={"hidden_act": ("silu",)},
    links=_LLAMA_LINKS,
    bias_keys={"attention_bias": ("qkv", "output"), "mlp_bias": ("mlp",)},
)
_QWEN_CONSTANTS = {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)}
_GPT2_FIXED = {
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "attention": "gqa",
    "qk_norm": False,
    "attention_gate": False,
    "bias": True,
    **_NO_EXPERTS,
}
_GPT2_QKV = "blocks.{}.attention.q_proj blocks.{}.attention.k_proj blocks.{}.attention.v_proj"

# `export_target` takes the first that expresses a configuration.
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
        fixed={name: value for name, value in _GPT2_FIXED.items() if name != "mlp"},
        rules={
            **_RULES,
            "num_kv_heads": Rule(lambda c: c.num_kv_heads == c.num_heads, "must be num_heads, {num_heads}"),
            "head_dim": Rule(lambda c: c.head_dim * c.num_heads == c.hidden_size, "must be hidden_size / num_heads"),
            # Biases that a model does not have are written as zeros.
            "bias": _ANY,
            "bias_in": _ANY,
        },
        choices={
            "mlp": (
                "activation_function",
                {"gelu": ("gelu_new", "gelu_pytorch_tanh"), "gelu_erf": ("gelu",)},  # the first two are one function
            )
        },
        defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.02},
        constants={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        links=(
            Link("transformer.wte", "embed_tokens"),
            Link("transformer.wpe", "embed_positions"),
            Link("transformer.h.{}.ln_1", "blocks.{}.attention_norm"),
            Link("transformer.h.{}.attn.c_attn", _GPT2_QKV, transposed=True),
            Link("transformer.h.{}.attn.c_proj", "blocks.{}.attention.o_proj", transposed=True),
            Link("transformer.h.{}.ln_2", "blocks.{}.mlp_norm"),
            Link("transformer.h.{}.mlp.c_fc", "blocks.{}.mlp.up_proj", transposed=True),
            Link("transformer.h.{}.mlp.c_proj", "blocks.{}.mlp.down_proj", transposed=True),
            Link("transformer.ln_f", "norm"),
            Link("lm_head", "lm_head"),
        ),
        written={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},  # for training it further without dropout
    ),
    "llama": _LLAMA,
    "arcee": replace(
        _LLAMA,
        architecture="ArceeForCausalLM",
        fixed={**_LLAMA_FIXED, "mlp": "relu2"},
        defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5},
        constants={"hidden_act": ("relu2",)},
    ),
    "starcoder2": Layout(
        architecture="Starcoder2ForCausalLM",
        keys={
            **{ours: theirs for ours, theirs in _LLAMA_KEYS.items() if ours != "head_dim"},
            "norm_eps": "norm_epsilon",
        },
        fixed={**_GPT2_FIXED, "position": "rope"},
        rules={
            **_LLAMA_RULES,
            "head_dim": Rule(lambda c: c.head_dim * c.num_heads == c.hidden_size, "must be hidden_size / num_heads"),
        },
        defaults={
            "num_key_value_heads": 2,
            "norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.018042,
        },
        constants={"hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "use_bias": (True,)},
        links=(
            *(link for link in _LLAMA_LINKS if ".mlp." not in link.theirs),
            Link("model.layers.{}.mlp.c_fc", "blocks.{}.mlp.up_proj"),
            Link("model.layers.{}.mlp.c_proj", "blocks.{}.mlp.down_proj"),
        ),
        # For training it further without dropout.
        written={"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": None},
    ),
    "mistral": replace(  # only read: without its window it is a Llama, which comes first
        _LLAMA,
        architecture="MistralForCausalLM",
        fixed={**_LLAMA_FIXED, "bias": False},
        rules=_LLAMA_RULES,
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 8},
        bias_keys={},
    ),
    "qwen2": replace(
        _LLAMA,
        architecture="Qwen2ForCausalLM",
        fixed={**_LLAMA_FIXED, "bias": True, "bias_in": "qkv"},
        rules={**_LLAMA_RULES, "bias_in": Rule(lambda c: c.bias_in == "qkv", "must be qkv")},
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 32},
        constants={"hidden_act": ("silu",), "use_sliding_window": (False,)},
        bias_keys={},
    ),
    "qwen3": replace(
        _LLAMA,
        architecture="Qwen3ForCausalLM",
        fixed={**_LLAMA_FIXED, "qk_norm": True, "bias": False},
        rules=_RULES,
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
        constants=_QWEN_CONSTANTS,
        bias_keys={},
    ),
    "qwen3_5_text": replace(  # the language model of Qwen3.5, with softmax attention in every layer
        _LLAMA,
        architecture="Qwen3_5ForCausalLM",
        fixed={**_LLAMA_FIXED, "qk_norm": True, "bias": False, "attention_gate": True},
        rules=_RULES,
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 4, "head_dim": 256},
        constants={"hidden_act": ("silu",), "attention_bias": (False,), "attn_output_gate": (True,)},
        links=_GATED_LINKS,
        bias_keys={},
        zero_centered=True,
        rope={"partial_rotary_factor": 0.25},
        layer_types=("linear_attention",),
    ),
    "glm4_moe": Layout(
        architecture="Glm4MoeForCausalLM",
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
        # The class chooses among groups of experts by the sum of the best two in each; there is one group.
        rules={**_RULES, "num_experts": Rule(lambda c: c.num_experts > 1, "must be at least 2")},
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
        constants={"hidden_act": ("silu",), "attention_bias": (False,), **_ONE_GROUP},
        links=_GLM_LINKS + _EXPERT_LINKS,
        stacked_links=_GLM_LINKS + _STACKED_LINKS,
        # Layers for speculative decoding. It is ignored when read: transformers writes 1 for models without any.
        written={"num_nextn_predict_layers": 0},
        rope={"partial_rotary_factor": 0.5},
    ),
    "deepseek_v3": Layout(
        architecture="DeepseekV3ForCausalLM",
        keys={
            **{ours: theirs for ours, theirs in _LLAMA_KEYS.items() if ours != "head_dim"},
            **_MOE_KEYS,
            **{name: name for name in LATENT_FIELDS},
            "num_experts": "n_routed_experts",
            "num_shared_experts": "n_shared_experts",
            "first_k_dense": "first_k_dense_replace",
            "routed_scaling_factor": "routed_scaling_factor",
        },
        fixed={**_MOE_FIXED, "attention": "mla", "qk_norm": False, "router": "sigmoid"},
        rules={
            **_RULES,
            "head_dim": _ANY,  # the sum of its two parts
            # The class chooses among groups of experts by the sum of the best two in each; there is one group. A model
            # without experts has dense layers only.
            "num_experts": Rule(lambda c: c.num_experts != 1, "must be 0 or at least 2"),
        },
        defaults={
            **{key: value for key, value in _LLAMA_DEFAULTS.items() if key != "head_dim"},
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "n_group": 8,
            "topk_group": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "moe_intermediate_size": 2048,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        constants={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "rope_interleave": (True,),
            **_ONE_GROUP,
        },
        links=_DEEPSEEK_LINKS + _EXPERT_LINKS,
        stacked_links=_DEEPSEEK_LINKS + _STACKED_LINKS,
        # What remote code of DeepSeek reads: the kind of router. And no layers for speculative decoding, see glm4_moe.
        written={
            "num_nextn_predict_layers": 0,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "ep_size": 1,
            "moe_layer_freq": 1,
        },
        neighboring_pairs=True,
    ),
    "qwen3_moe": Layout(
        architecture="Qwen3MoeForCausalLM",
        keys={**_LLAMA_KEYS, **_MOE_KEYS, "num_experts": "num_experts", "first_k_dense": "mlp_only_layers"},
        fixed={**_MOE_FIXED, "router": "softmax", "qk_norm": True},
        rules=_SOFTMAX_RULES,
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 4, "norm_topk_prob": False, "mlp_only_layers": None},
        constants={**_QWEN_CONSTANTS, "decoder_sparse_step": (1,)},
        links=_LLAMA_LINKS + _EXPERT_LINKS,
        stacked_links=_LLAMA_LINKS + _STACKED_LINKS,
        aliases={"num_experts": "num_local_experts"},  # transformers 4 and 5
    ),
    "mixtral": Layout(
        architecture="MixtralForCausalLM",
        keys={
            **{ours: theirs for ours, theirs in _LLAMA_KEYS.items() if ours != "intermediate_size"},
            "num_experts": "num_local_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "moe_intermediate_size": "intermediate_size",
        },
        fixed={**_MOE_FIXED, "router": "softmax", "qk_norm": False, "norm_topk_prob": True, "first_k_dense": 0},
        rules={**_SOFTMAX_RULES, "intermediate_size": _ANY},  # no dense layer has it
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        constants={"hidden_act": ("silu",)},
        links=(
            *_LLAMA_LINKS,
            Link("model.layers.{}.block_sparse_moe.gate", "blocks.{}.mlp.router"),
            Link("model.layers.{}.block_sparse_moe.experts.*.w1.weight", "blocks.{}.mlp.experts.gate_proj"),
            Link("model.layers.{}.block_sparse_moe.experts.*.w3.weight", "blocks.{}.mlp.experts.up_proj"),
            Link("model.layers.{}.block_sparse_moe.experts.*.w2.weight", "blocks.{}.mlp.experts.down_proj"),
        ),
        stacked_links=_LLAMA_LINKS + _STACKED_LINKS,
        rope={"rope_theta": 1_000_000.0},
    ),
}

# Why LightLM does not have a model of these, by model_type.
_AFTER = "it normalizes what attention and feed-forward networks put out, not what goes in"
_PARALLEL = "attention and feed-forward network of a layer read the same input"
_GELU_GATE = "the gate of its feed-forward networks is a GELU"
_OTHER_POSITIONS = "its positions are neither rotary nor learned in the way of GPT-2"
MISSING_PARTS = {
    "olmo": "its norms have no weights",
    "olmo2": _AFTER,
    "olmo3": _AFTER,
    "olmoe": "it normalizes queries over all heads together",
    "exaone4": _AFTER,
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _GELU_GATE),
    **dict.fromkeys(("gpt_neox", "gptj", "phi", "cohere", "cohere2", "falcon"), _PARALLEL),
    "lfm2": "most of its layers are convolutions",
    "phi3": "its projections are stored as one",
    "smollm3": "some of its layers have no positions",
    "granite": "it scales attention, residual branches and logits by factors of its own",
    "stablelm": "only a part of each head rotates",
    "nemotron": "only a part of each head rotates, and norms multiply by 1 + weight",
    **dict.fromkeys(("opt", "bloom", "mpt"), _OTHER_POSITIONS),
    "gpt_neo": "half of its layers see a window, and attention is not scaled by the size of a head",
    "gpt_bigcode": "its projections are stored as one, with one head of keys",
    "qwen2_moe": "its shared expert has a gate of its own",
    "deepseek_v2": "its experts are chosen otherwise than DeepSeek-V3's",
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "jamba", "bamba", "zamba2", "qwen3_next"), "it has recurrent layers"),
}


@dataclass(frozen=True)
class ExportTarget:
    """The Hugging Face class that computes what a model computes, or the reason why there is none."""

    architecture: str = ""  # the class, such as LlamaForCausalLM; empty when refused
    model_type: str = ""  # its `model_type` in config.json, such as llama
    refusal: str = ""  # one sentence naming the fields in the way; empty when it can be exported


def export_target(config: ModelConfig) -> ExportTarget:
    """Return the class that a configuration exports to with equal logits, or a refusal; see `nearest_layout`."""
    nearest, obstacles = nearest_layout(LAYOUTS, config)
    architecture = LAYOUTS[nearest].architecture
    if obstacles:
        return ExportTarget(refusal=f"{architecture}, the nearest Hugging Face class, cannot have {obstacles}")
    return ExportTarget(architecture, nearest)
