"""Normalization layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightlm.model import fused
from lightlm.model.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    The weight is cast to the input's precision: under autocast, queries and keys are bf16, and torch's fused kernel
    does not take mixed precisions. The kernel computes the mean in fp32 either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        if fused.applies(x):
            return fused.RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (arXiv 1607.06450).

    Weight and bias are cast to the input's precision, which torch's kernel on a CPU does not mix: under FSDP they are
    gathered in bf16, and the residual stream is fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


def build_norm(config: ModelConfig) -> nn.Module:
    """Return the norm before attention, before the feed-forward network, or before the head."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.has_bias("norm"))
