"""Muon: momentum whose matrices are orthogonalised before they become an update
(Keller Jordan, https://kellerjordan.github.io/posts/muon/, 2024).

torch.optim.Muon has the same arithmetic for single 2-D weights in bf16. This one also takes stacked experts, shards
of FSDP2 and devices without fast bf16, and orthogonalises many small matrices in one call.

Shapes: N matrices of R rows and C columns, R <= C; E experts.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightlm.train.optim.adamw import cautious_decay_
from lightlm.train.step.parallel import like_parameter, whole

# The quintic of Keller Jordan's post, chosen for its slope at zero: five steps bring every singular value from 0.002 to
# 1 of the norm to between 0.68 and 1.20. It never settles at 1; the post found that this costs nothing.
QUINTIC = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7  # of the norm; torch.optim.Muon's

# Elements orthogonalised in one call. On a CPU core with AMX (benchmarks/orthogonalize.py), 24 matrices one by one, in
# calls of at most 2**20 elements, and all at once: 64 x 64: 8.1, 0.8 and 0.8 ms; 256 x 768: 37, 33 and 32 ms;
# 576 x 1536: 260, 255 and 420 ms. An accelerator wants few large calls: 2**24 elements are 19 matrices of 576 x 1536,
# and take some 0.2 GB beside the optimizer's state, by count.
_CALL_ELEMENTS = {"cpu": 2**20}
_ACCELERATOR_CALL_ELEMENTS = 2**24


def orthogonalise(matrices_NRC: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Roughly U V^T of each matrix U S V^T: `steps` of the Newton-Schulz quintic in `dtype`, which is the result's."""
    a, b, c = QUINTIC
    norms_N11 = torch.linalg.vector_norm(matrices_NRC, dim=(-2, -1), keepdim=True)
    x = (matrices_NRC / norms_N11.clamp(min=_EPS)).to(dtype)
    if len(x) > 1:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    x = x[0]  # a batch of one runs a third slower than plain products on a CPU in bf16
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x[None]


def update_scale(rule: str, out_features: int, in_features: int) -> float:
    """What an orthogonal (out, in) update is multiplied by, beside the learning rate.

    `match_rms_adamw`, 0.2 sqrt(max(out, in)), gives it the root mean square of a usual AdamW update, so that AdamW's
    rates and decay can be kept (arXiv 2502.16982, section 2.2); `original`, sqrt(max(1, out / in)), is Keller Jordan's.
    """
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out_features, in_features))
    return math.sqrt(max(1.0, out_features / in_features))


class Muon(torch.optim.Optimizer):
    """Muon for some groups and another optimizer for the rest, as one optimizer.

    Its state for a matrix is `momentum_buffer`, for other parameters that of the other optimizer.

    Args:
        groups: of weights (out, in) or stacked weights (E, out, in), with `lr` and `weight_decay` each.
        others: holds all other parameters.
        momentum: how much of the mean gradient a step keeps.
        nesterov: look one step ahead: mix the gradient into the mean once more.
        ns_steps: of Newton-Schulz.
        scale_rule: see `update_scale`.
        cautious: decay only where the update shrinks a weight too (arXiv 2510.12402).
        dtype: precision of Newton-Schulz; bf16 is enough where it is fast.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        others: torch.optim.Optimizer,
        *,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        scale_rule: str,
        cautious: bool,
        dtype: torch.dtype,
    ) -> None:
        assert all(parameter.ndim in (2, 3) for group in groups for parameter in group["params"])
        self._others, self._num_groups = others, len(groups)
        self._momentum, self._nesterov, self._ns_steps = momentum, nesterov, ns_steps
        self._scale_rule, self._cautious, self._dtype = scale_rule, cautious, dtype
        super().__init__([*groups, *others.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        # load_state_dict makes new groups and a new state: the other optimizer gets its share of them at each step.
        self._others.state = self.state
        self._others.param_groups = self.param_groups[self._num_groups :]
        self._others.step()
        for group in self.param_groups[: self._num_groups]:
            for parameters in _calls([p for p in group["params"] if p.grad is not None]):
                self._update(parameters, group["lr"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """One step of parameters that are all of the same shape, or of its transpose."""
        # FSDP2 shards a weight's rows or its experts. A matrix can only be orthogonalised whole: every rank gathers it,
        # does the same arithmetic, and keeps its own part.
        wide = [_as_wide(whole(self._direction(parameter))) for parameter in parameters]
        joined_NRC = wide[0] if len(wide) == 1 else torch.cat(wide)
        updates_NRC = orthogonalise(joined_NRC, self._ns_steps, self._dtype)
        parts = updates_NRC.split([len(matrices) for matrices in wide])
        for parameter, part_NRC in zip(parameters, parts, strict=True):
            rows, columns = parameter.shape[-2:]
            update = (part_NRC.mT if rows > columns else part_NRC).reshape(parameter.shape)
            update = like_parameter(update, parameter)
            if self._cautious:
                cautious_decay_(parameter, update, lr * weight_decay)
            else:
                parameter.mul_(1 - lr * weight_decay)
            parameter.add_(update, alpha=-lr * update_scale(self._scale_rule, rows, columns))

    def _direction(self, parameter: Tensor) -> Tensor:
        """The momentum with this step's gradient in it. Means rather than sums: the direction is normalised anyway."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - self._momentum)
        return parameter.grad.lerp(mean, self._momentum) if self._nesterov else mean


def _calls(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in the groups that are orthogonalised in one call; a function of shapes alone."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(tuple(sorted(parameter.shape[-2:])), []).append(parameter)
    for group in groups.values():
        limit = _CALL_ELEMENTS.get(group[0].device.type, _ACCELERATOR_CALL_ELEMENTS)
        call: list[Tensor] = []
        for parameter in group:
            if call and sum(p.numel() for p in call) + parameter.numel() > limit:
                yield call
                call = []
            call.append(parameter)
        yield call


def _as_wide(weights: Tensor) -> Tensor:
    """(out, in) or (E, out, in) as (1 or E, R, C) with R <= C: the products of a step have R rows."""
    matrices = weights.view(-1, *weights.shape[-2:])
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
