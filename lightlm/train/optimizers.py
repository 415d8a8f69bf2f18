"""Optimizers and their state under parameter names."""

from typing import Any

import torch
from torch import nn

from lightlm.errors import CheckpointError
from lightlm.recipe import OptimizerSection
from lightlm.train.parallel import like_parameter, whole


def build_optimizer(model: nn.Module, recipe: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) with decay on matrices and embeddings only, not on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state for each parameter name, on the CPU: it fits any grouping, any device and any sharding.

    With FSDP all processes must call it.
    """
    return {
        name: {key: whole(value).cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
        for name, parameter in model.named_parameters()
        if (state := optimizer.state.get(parameter))
    }


def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, dict[str, Any]]) -> None:
    """Put back what `named_state` took.

    Raises:
        CheckpointError: the names are not those of the model.
    """
    parameters = dict(model.named_parameters())
    if states and states.keys() != parameters.keys():
        differing = sorted(states.keys() ^ parameters.keys())
        raise CheckpointError(f"the optimizer state does not fit the model; differing parameters: {differing[:5]}")
    for name, state in states.items():
        parameter = parameters[name]
        # AdamW keeps its step count in fp32 on the parameter's device when fused.
        optimizer.state[parameter] = {
            key: like_parameter(value, parameter) if isinstance(value, torch.Tensor) else value
            for key, value in state.items()
        }
