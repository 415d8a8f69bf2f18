"""Optimizers and their state under parameter names."""

from typing import Any

import torch
from torch import nn

from lightlm.device import pick_dtype
from lightlm.errors import CheckpointError
from lightlm.recipe import OptimizerSection
from lightlm.train.optim.adamw import CautiousAdamW
from lightlm.train.optim.muon import Muon
from lightlm.train.step.parallel import is_sharded, like_parameter, whole

MATRICES = "matrices"


def build_optimizer(
    model: nn.Module, recipe: OptimizerSection, dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Args:
        dtype: precision of Muon's products; None is bf16 where the model's device is fast in it, else fp32.
    """
    groups = parameter_groups(model, recipe)
    adamw = CautiousAdamW if recipe.cautious else torch.optim.AdamW
    settings: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps, "fused": True}
    if recipe.name == "adamw":
        return adamw(groups, **settings)
    return Muon(
        [group for group in groups if group["name"] == MATRICES],
        adamw([group for group in groups if group["name"] != MATRICES], **settings),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        ns_steps=recipe.ns_steps,
        scale_rule=recipe.update_scale,
        cautious=recipe.cautious,
        dtype=dtype or pick_dtype("auto", next(model.parameters()).device),
    )


def parameter_groups(model: nn.Module, recipe: OptimizerSection) -> list[dict[str, Any]]:
    """The trainable parameters by kind, each group with its name, peak rate (`lr` and `peak_lr`) and decay.

    Kinds: the blocks' `matrices` (stacked experts too); `embedding`, tables of tokens and positions, with the head
    where it is tied; `head`; `scalar`, norms and biases, which do not decay. A kind without parameters has no group.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault(_kind(name, parameter, id(parameter) in tables), []).append(parameter)
    table_decay = recipe.weight_decay if recipe.embedding_weight_decay is None else recipe.embedding_weight_decay
    settings = {
        MATRICES: (recipe.lr, recipe.weight_decay),
        "embedding": (recipe.embedding_lr, table_decay),
        "head": (recipe.head_lr, table_decay),
        "scalar": (recipe.scalar_lr, 0.0),
    }
    groups = []
    for kind, (own_lr, decay) in settings.items():
        if kind in members:
            lr = own_lr or recipe.lr
            groups.append({"name": kind, "params": members[kind], "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return groups


def _kind(name: str, parameter: nn.Parameter, is_table: bool) -> str:
    if parameter.ndim < 2:
        return "scalar"
    if is_table:
        return "embedding"
    return "head" if "lm_head" in name.split(".") else MATRICES


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current rates for the metrics: `lr` of the matrices, and `lr_<group>` of each group whose peak is another."""
    groups = {group["name"]: group for group in optimizer.param_groups}
    main = groups[MATRICES]
    others = {f"lr_{name}": group["lr"] for name, group in groups.items() if group["peak_lr"] != main["peak_lr"]}
    return {"lr": main["lr"], **others}


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's own state for each parameter name, so that it fits any grouping; no copy, where it lies.

    A sharded run's is gathered on the CPU, for which all processes must call.
    """
    return {
        name: {key: whole(value).cpu() if is_sharded(value) else value for key, value in state.items()}
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
