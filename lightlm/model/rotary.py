"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of the Hugging Face Llama classes.

Shapes: B batch, T positions in this call, H heads, K head size (or its part that rotates).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightlm.model.config import ModelConfig


def rotary_table(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (..., K) in fp32, for integer `positions` of any shape.

    They are computed on each call: a stored table would be damaged by `.bfloat16()` or a build on the meta device.
    Angles are fp32, because in bf16 positions past 256 would collide.
    """
    angles = positions[..., None].float() * rotary_frequencies(config, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotary_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Return the angle of one position for each pair of channels, (K/2,) in fp32, scaled as `rope_scaling` says."""
    exponents = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32) / config.rotary_dim
    # As transformers writes it: `theta**-exponents` differs in the last bit, which thousands of positions multiply.
    # SmolLM2's logits at 2,000 positions then differ by 2.6e-4; this way they are equal.
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling == "none" else frequencies / _divisors(config, frequencies)


def rotary_divisors(config: ModelConfig) -> Tensor:
    """Return what `rope_scaling` divides each frequency by, (K/2,) in fp32."""
    return _divisors(config, rotary_frequencies(replace(config, rope_scaling="none")))


def _divisors(config: ModelConfig, frequencies: Tensor) -> Tensor:
    if config.rope_scaling != "llama3":
        return torch.full_like(frequencies, config.rope_factor if config.rope_scaling == "linear" else 1.0)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = frequencies * (config.rope_original_seq_len / (2 * math.pi))  # in a sequence of the first training
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / (kept + (1.0 - kept) / config.rope_factor)


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + K/2]) by its position's angle; cos and sin broadcast to (B, 1, T, K)."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos.to(x_BHTK.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x_BHTK.dtype)
