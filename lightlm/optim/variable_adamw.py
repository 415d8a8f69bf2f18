"""AdamW with what torch's lacks: cautious weight decay, and a beta2 that differs between steps."""

import math
from typing import Any

import torch
from torch import Tensor

from lightlm.optim.cautious import cautious_decay_


class VariableAdamW(torch.optim.AdamW):
    """torch's fused AdamW, with other numbers in its groups while it takes a step.

    A group with `beta2_half_life` gets its `betas` anew before each step. The state of its parameters also has
    `half_lives`: how many half-lives of the second moment have passed.

    Args:
        cautious: decay a weight only where the update also shrinks it. The kernel would decay every weight, so it runs
            without decay, after a decay that comes first as in AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], *, cautious: bool, **settings: Any) -> None:
        self._cautious = cautious
        super().__init__(groups, **settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        given = [{key: group[key] for key in ("lr", "eps", "weight_decay")} for group in self.param_groups]
        passed: list[tuple[Tensor, float]] = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if self._cautious:
                if group["weight_decay"]:
                    for parameter in parameters:
                        direction = self._direction(parameter, group["betas"][0])
                        cautious_decay_(parameter, direction, group["lr"] * group["weight_decay"])
                group["weight_decay"] = 0.0
            if group.get("beta2_half_life") and parameters:
                beta2 = group["betas"][1]  # 0 where the batch has more half-lives than float64 can hold
                added = -math.log2(beta2) if beta2 else math.inf
                passed += [(p, self._half_lives(p) + added) for p in parameters]
                self._correct_bias(group, parameters[0], passed[-1][1])
        super().step()
        for group, values in zip(self.param_groups, given, strict=True):
            group.update(values)
        for parameter, half_lives in passed:
            self.state[parameter]["half_lives"] = half_lives

    def _direction(self, parameter: Tensor, beta: float) -> Tensor:
        """Return the mean gradient after this step, which has the signs of AdamW's update."""
        assert parameter.grad is not None
        mean = self.state[parameter].get("exp_avg")
        return parameter.grad if mean is None else torch.lerp(mean, parameter.grad, 1 - beta)

    def _half_lives(self, parameter: Tensor) -> float:
        """Return the half-lives before this step. A moment that a fixed beta2 made earlier counts as long settled."""
        state = self.state[parameter]
        return state.get("half_lives", math.inf if state else 0.0)

    def _correct_bias(self, group: dict[str, Any], parameter: Tensor, half_lives: float) -> None:
        """Change a group's numbers so that the kernel's update has the right bias correction.

        The second moment v is a weighted mean of squares and of its start, zero. The squares' weights add up to
        1 - (product of all beta2) = 1 - 0.5 ** half_lives, by which v is divided. The kernel divides by 1 - beta2 **
        steps instead. With k = sqrt(right / kernel's), lr m / (sqrt(v / right) + eps) is k lr m / (sqrt(v / kernel's)
        + k eps). All parameters of a group have taken the same steps.
        """
        steps = float(self.state[parameter].get("step", 0)) + 1
        right, kernels = -math.expm1(-math.log(2) * half_lives), 1 - group["betas"][1] ** steps
        k = math.sqrt(right / kernels)
        group.update(lr=group["lr"] * k, eps=group["eps"] * k, weight_decay=group["weight_decay"] / k)
