"""How the routers of a mixture of experts are trained: by losses, and by a selection bias that balances without a loss.

Shapes: L layers of experts in the order they run, R routers, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightlm.model.moe import Router, Routing
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of the routers' losses."""

    balance: float = 0.0
    z: float = 0.0

    def __call__(self, routings: list[Routing]) -> Tensor:
        """Return the weighted losses, summed over layers, in nats per token."""
        total = torch.zeros((), device=routings[0].z.device)
        if self.balance:
            total = total + self.balance * torch.stack([routing.balance for routing in routings]).sum()
        if self.z:
            total = total + self.z * torch.stack([routing.z for routing in routings]).sum()
        return total


def router_losses(recipe: Recipe) -> RouterLosses:
    """Return the recipe's coefficients, with the defaults of its kind of router."""
    settings = recipe.router_training
    return RouterLosses(settings.balance_loss_coef or 0.0, settings.z_loss_coef)


@torch.no_grad()
def move_selection_biases(model: Transformer, load_LE: Tensor, rate: float) -> None:
    """Raise the bias of experts below the mean load by `rate`, and lower the bias of those above (arXiv 2408.15664).

    Args:
        load_LE: tokens per expert, from the whole global batch. Layers that repeat a block share its bias.
    """
    routers = [module for module in model.blocks.modules() if isinstance(module, Router)]
    load_LRE = load_LE.view(len(routers), model.config.layer_sharing, -1)
    for router, load_E in zip(routers, load_LRE.sum(1).unbind(), strict=True):
        assert router.selection_bias is not None
        # Integers, E times the mean: exact, also on MPS, which lacks float64.
        router.selection_bias += rate * torch.sign(load_E.sum() - len(load_E) * load_E)


@torch.no_grad()
def selection_bias_ranges(model: Transformer) -> list[float] | None:
    """Return the largest minus the smallest selection bias of each layer (L), or None for routers without biases.

    Waits for the device.
    """
    routers = [module for module in model.blocks.modules() if isinstance(module, Router)]
    biases = [router.selection_bias for router in routers if router.selection_bias is not None]
    if not biases:
        return None
    bias_RE = torch.stack(biases)
    return (bias_RE.amax(1) - bias_RE.amin(1)).repeat_interleave(model.config.layer_sharing).tolist()
