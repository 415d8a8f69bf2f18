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
    loads = load_LE.unbind()
    for router, layers in _layers_of_routers(model):
        load_E = torch.stack([loads[layer] for layer in layers]).sum(0)
        assert router.selection_bias is not None
        # Integers, E times the mean: exact, also on MPS, which lacks float64.
        router.selection_bias += rate * torch.sign(load_E.sum() - len(load_E) * load_E)


@torch.no_grad()
def selection_bias_ranges(model: Transformer) -> list[float] | None:
    """Return the largest minus the smallest selection bias of each layer (L), or None for routers without biases.

    Waits for the device.
    """
    biases = [router.selection_bias for router, layers in _layers_of_routers(model) for _ in layers]
    known = [bias for bias in biases if bias is not None]
    if not known:
        return None
    bias_LE = torch.stack(known)
    return (bias_LE.amax(1) - bias_LE.amin(1)).tolist()


def _layers_of_routers(model: Transformer) -> list[tuple[Router, range]]:
    """Return each router with its layers, in the order of the routings that `Transformer.hidden_states` appends."""
    found: list[tuple[Router, range]] = []
    for part, repeats in ((model.blocks, model.config.layer_sharing), (model.mtp, 1)):
        for router in (module for module in part.modules() if isinstance(module, Router)):
            first = found[-1][1].stop if found else 0
            found.append((router, range(first, first + repeats)))
    return found
