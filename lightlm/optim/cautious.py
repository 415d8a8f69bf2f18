"""Cautious weight decay (arXiv 2510.12402), and AdamW with it."""

from typing import Any

import torch
from torch import Tensor


def cautious_decay_(parameter: Tensor, update: Tensor, rate: float) -> None:
    """Do parameter -= rate * parameter where update * parameter >= 0: where subtracting `update` also moves it to zero.

    The two tensors have the same shape.
    """
    agreeing = (update * parameter >= 0).to(parameter.dtype)  # not ge_: torch 2.11 cannot shard it
    parameter.addcmul_(parameter, agreeing, value=-rate)


class CautiousAdamW(torch.optim.AdamW):
    """AdamW that decays a weight only where the update also shrinks it; the arguments are AdamW's.

    The fused kernel would decay every weight. It runs without decay, after a decay that comes first as in AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        groups = [{**group, "weight_decay": 0.0, "cautious_decay": group["weight_decay"]} for group in groups]
        super().__init__(groups, **settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["cautious_decay"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        direction = self._direction(parameter, group["betas"][0])
                        cautious_decay_(parameter, direction, group["lr"] * group["cautious_decay"])
        super().step(closure)

    def _direction(self, parameter: Tensor, beta: float) -> Tensor:
        """Return the mean gradient after this step, which has the signs of AdamW's update."""
        assert parameter.grad is not None
        mean = self.state[parameter].get("exp_avg")
        return parameter.grad if mean is None else torch.lerp(mean, parameter.grad, 1 - beta)
