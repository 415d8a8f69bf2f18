"""Parameter groups: which parameters share a learning rate and a weight decay."""

import fnmatch
from typing import Any

import torch
from torch import nn

from lightlm.optim.section import MATRICES, OptimizerSection, StepSettings

# The first pattern that fits a parameter's name decides its group. `ln_` and `wte` are Hugging Face's GPT-2.
PATTERNS = (
    ("*norm.weight", "scalar"),
    ("*ln_?.weight", "scalar"),
    ("*bias", "scalar"),
    ("*residual.scale", "scalar"),
    ("*_multipliers", "multipliers"),  # of rows and columns; those of stacked experts have two dimensions
    ("*embed_*.weight", "embedding"),  # tables of tokens and positions, and the head where it is tied
    ("*wte.weight", "embedding"),
    ("*wpe.weight", "embedding"),
    ("*lm_head.weight", "head"),
    ("*", MATRICES),  # of the blocks, stacked experts too
)


def build_optimizer(model: nn.Module, section: OptimizerSection, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Return the section's optimizer for a model's trainable parameters.

    Args:
        dtype: precision of matrix products in training.
    """
    return section.build(parameter_groups(model, section), dtype)


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Return the trainable parameters by group, each with `name`, `params`, and its learning rate and weight decay.

    `peak_lr` and `full_weight_decay` are the recipe's; `lr` and `weight_decay` those of a step. `eps_factor` is there
    if the model's depth asks for another eps of AdamW (`Transformer.eps_factor`). A group without parameters is left
    out.

    Raises:
        ValueError: a vector has no pattern of its own; it would be taken for a matrix.
    """
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        group = next(group for pattern, group in PATTERNS if fnmatch.fnmatchcase(name, pattern))
        if group == MATRICES and parameter.ndim < 2:
            raise ValueError(f"parameter {name} is not a matrix; add its pattern to lightlm.optim.groups.PATTERNS")
        if parameter.requires_grad:
            members.setdefault(group, []).append(parameter)
    decay, table_decay = section.weight_decay, section.embedding_weight_decay
    table_decay = decay if table_decay is None else table_decay
    rates_and_decays = {
        MATRICES: (section.lr, decay),
        "embedding": (section.embedding_lr or section.lr, table_decay),
        "head": (section.head_lr or section.lr, table_decay),
        "scalar": (section.scalar_lr or section.lr, 0.0),
        "multipliers": (section.scalar_lr or section.lr, section.multiplier_weight_decay),
    }
    eps_factor = getattr(model, "eps_factor", 1.0)
    extra = {"eps_factor": eps_factor} if eps_factor != 1 else {}
    return [
        {"name": group, "params": members[group], "lr": lr, "peak_lr": lr}
        | {"weight_decay": group_decay, "full_weight_decay": group_decay}
        | extra
        for group, (lr, group_decay) in rates_and_decays.items()
        if group in members
    ]


def set_step(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Set what differs between steps in all groups, before a step."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * settings.lr
        group["weight_decay"] = group["full_weight_decay"] * settings.weight_decay
        if settings.momentum is not None and group["name"] == MATRICES:
            group["momentum"] = settings.momentum
        if half_life := group.get("beta2_half_life"):
            group["betas"] = (group["betas"][0], 0.5 ** (settings.batch_tokens / half_life))


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the current rates for the metrics: `lr` of the matrices, and `lr_<group>` where a group's peak differs."""
    groups = {group["name"]: group for group in optimizer.param_groups}
    main = groups[MATRICES]
    others = {f"lr_{name}": group["lr"] for name, group in groups.items() if group["peak_lr"] != main["peak_lr"]}
    return {"lr": main["lr"], **others}
