"""Tiny models of every kind that llama.cpp runs."""

from dataclasses import replace

from tests.shapes import SHAPES

_LLAMA = SHAPES["llama"]
_MOE = replace(_LLAMA, num_experts=4, num_experts_per_tok=2)
_DEEPSEEK = replace(SHAPES["deepseek"], norm_eps=1e-6)

MODELS = {
    name: SHAPES[name]
    for name in ("gpt2", "llama", "qwen2", "llama3", "qwen3", "moe", "scaled", "scaled_gpt2", "scaled_moe")
}
MODELS |= {
    "wide": replace(_LLAMA, hidden_size=64, intermediate_size=96),
    "narrow": replace(_LLAMA, intermediate_size=40),
    "biases": replace(_LLAMA, bias=True),
    "biases_mlp": replace(_LLAMA, bias=True, bias_in="mlp"),
    "linear_qwen3": replace(SHAPES["qwen3"], rope_scaling="linear", rope_factor=4.0),
    "llama3_mixtral": replace(_MOE, router="softmax", rope_scaling="llama3", rope_factor=2.0),
    "wide_heads": replace(_LLAMA, head_dim=16),
    "repeated": replace(_LLAMA, layer_sharing=2),
    "repeated_moe": replace(SHAPES["moe"], layer_sharing=2),
    "mixtral": replace(_MOE, router="softmax"),
    "qwen3moe": replace(_MOE, router="softmax", qk_norm=True),
    "softmax": replace(_MOE, router="softmax", num_shared_experts=1, first_k_dense=1, norm_topk_prob=False),
    "not_shared": replace(_MOE, qk_norm=True),
    "deepseek2": _DEEPSEEK,
    "deepseek2_dense": replace(SHAPES["mla"], bias=False, bias_in="all", norm_eps=1e-6),
    "deepseek2_softmax": replace(_DEEPSEEK, router="softmax", num_shared_experts=0, q_lora_rank=0, layer_sharing=2),
}
