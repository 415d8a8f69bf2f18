"""Feed-forward networks.

Shapes: B batch, T positions, D hidden size, F intermediate size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lightlm.model import fused
from lightlm.model.config import ModelConfig
from lightlm.model.scaling import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config, config.hidden_size, intermediate_size, "mlp")
        self.up_proj = Linear(config, config.hidden_size, intermediate_size, "mlp")
        self.down_proj = Linear(config, intermediate_size, config.hidden_size, "mlp")

    def forward(self, x_BTD: Tensor) -> Tensor:
        if fused.applies(x_BTD):
            h_BTF = fused.SwiGLUFunction.apply(fused.linear(x_BTD, self.gate_proj, self.up_proj))
            return fused.linear(h_BTF, self.down_proj)
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class MLP(nn.Module):
    """down(act(up(x))) with GELU, GPT-2's approximation of it by tanh, or squared ReLU (arXiv 2109.08668)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.mlp
        self.up_proj = Linear(config, config.hidden_size, config.intermediate_size, "mlp")
        self.down_proj = Linear(config, config.intermediate_size, config.hidden_size, "mlp")

    def forward(self, x_BTD: Tensor) -> Tensor:
        if fused.applies(x_BTD):
            return fused.linear(self.activate(fused.linear(x_BTD, self.up_proj)), self.down_proj)
        return self.down_proj(self.activate(self.up_proj(x_BTD)))

    def activate(self, h_BTF: Tensor) -> Tensor:
        if self.activation == "relu2":
            return F.relu(h_BTF).square()
        return F.gelu(h_BTF, approximate="tanh" if self.activation == "gelu" else "none")


def build_mlp(config: ModelConfig) -> nn.Module:
    """Return the dense feed-forward network of one block."""
    return SwiGLU(config, config.intermediate_size) if config.mlp == "swiglu" else MLP(config)
