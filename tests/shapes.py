"""Tiny models of every architecture that LightLM covers."""

from dataclasses import replace

import torch

from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.recipe import Start

_BASE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_seq_len": 48, "vocab_size": 97}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_kv_heads": 2}
_GPT2 = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True}

SHAPES = {
    "gpt2": ModelConfig(**_BASE, **_GPT2),
    "gpt3": ModelConfig(**_BASE, **_GPT2, sliding_window=5),
    "llama": ModelConfig(**_BASE, num_kv_heads=2),
    "qwen3": ModelConfig(**_BASE, num_kv_heads=1, head_dim=16, qk_norm=True, tie_embeddings=False),
    "gated": ModelConfig(**_BASE, num_kv_heads=2, head_dim=16, qk_norm=True, attention_gate=True),
    "relu2": ModelConfig(**_BASE, mlp="relu2", bias=True),
    "nanogpt": ModelConfig(**_BASE, **_GPT2 | {"mlp": "gelu_erf", "bias": False}),
    "qwen2": ModelConfig(**_BASE, num_kv_heads=2, bias=True, bias_in="qkv", rope_scaling="linear", rope_factor=2.5),
    "llama3": ModelConfig(
        **_BASE,
        head_dim=16,
        bias=True,
        bias_in="attention",
        rope_theta=20.0,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original_seq_len=16,
    ),
    "shared": ModelConfig(**_BASE, num_kv_heads=2, layer_sharing=2, sliding_window=7),
    "moe": ModelConfig(
        **_BASE, **_EXPERTS, num_shared_experts=1, first_k_dense=1, qk_norm=True, routed_scaling_factor=1.5
    ),
    "softmax_moe": ModelConfig(**_BASE, **_EXPERTS, router="softmax", norm_topk_prob=False, attention_gate=True),
}
_LATENT = {"attention": "mla", "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
SHAPES |= {
    "mla": ModelConfig(**_BASE, **_LATENT, bias=True, bias_in="mlp"),
    "deepseek": replace(
        SHAPES["moe"], **_LATENT | {"v_head_dim": 16}, q_lora_rank=20, num_kv_heads=0, qk_norm=False, first_k_dense=1
    ),
    "mla_banded": ModelConfig(
        **_BASE,
        attention="mla",
        kv_lora_rank=5,
        sliding_window=6,
        layer_sharing=2,
        rope_scaling="linear",
        rope_factor=2.5,
    ),
}
_SCALES = {"multipliers": "both", "residual_scale": 0.8, "embedding_scale": 1.7, "base_depth": 3}
SHAPES |= {
    "scaled": replace(SHAPES["qwen3"], **_SCALES, tie_embeddings=True, qk_gain=1.2),
    "scaled_gpt2": replace(SHAPES["gpt2"], **_SCALES | {"multipliers": "rows"}),
    "scaled_moe": replace(SHAPES["moe"], **_SCALES, qk_gain=1.2),
    "scaled_mla": replace(SHAPES["deepseek"], **_SCALES),
}

# The model on the Hub that the recipes `finetune` and `chat` start from.
SMOLLM2 = ModelConfig(
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    intermediate_size=1536,
    max_seq_len=8192,
    vocab_size=49_152,
    rope_theta=100_000,
).resolved()


def without_hub(reference: str, key: str = "train.init_from") -> Start:
    """What `find_start` finds on the Hub, for recipes that LightLM ships."""
    assert reference == "HuggingFaceTB/SmolLM2-135M"
    return Start(reference, SMOLLM2)


def build(name: str, seed: int = 0) -> Transformer:
    """A model in evaluation mode whose weights are large enough for differences to show."""
    torch.manual_seed(seed)
    model = Transformer(SHAPES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model
