"""Muon's arithmetic: momentum whose matrices are orthogonalized before they become an update.

torch.optim.Muon has the same arithmetic for single 2-D weights in bf16. This one also takes stacked experts, shards
of FSDP2 and devices without fast bf16, and orthogonalizes many small matrices in one call.

Shapes: N matrices of R rows and C columns, R <= C; E experts.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightlm.optim.cautious import cautious_decay_
from lightlm.sharding import like_parameter, whole

# The quintic of Keller Jordan's post, chosen for its slope at zero: five steps map singular values between 0.002 and 1
# of the norm into the range from 0.68 to 1.20. They never converge to 1; the post found no loss from that.
QUINTIC = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7  # least norm; torch.optim.Muon's

# Most elements orthogonalized in one call. Milliseconds for 24 matrices on a CPU core with AMX, one by one, in calls of
# at most 2**20 elements, and all at once (benchmarks/orthogonalize.py):
#     64 x 64     8.1  0.8  0.8
#     256 x 768    37   33   32
#     576 x 1536  260  255  420
# An accelerator wants few large calls: 2**24 elements are 19 matrices of 576 x 1536. By count, they take 0.2 GB beside
# the optimizer's state.
_CALL_ELEMENTS = {"cpu": 2**20}
_ACCELERATOR_CALL_ELEMENTS = 2**24


def orthogonalize(matrices_NRC: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return roughly U V^T of each matrix U S V^T, by `steps` of the Newton-Schulz quintic in `dtype`."""
    a, b, c = QUINTIC
    norms_N11 = torch.linalg.vector_norm(matrices_NRC, dim=(-2, -1), keepdim=True)
    x = (matrices_NRC / norms_N11.clamp(min=_EPS)).to(dtype)
    if len(x) > 1:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    x = x[0]  # on a CPU in bf16, a batch of one is a third slower than plain products
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x[None]


def update_scale(rule: str, out_features: int, in_features: int) -> float:
    """Return the factor on an orthogonal (out, in) update, beside the learning rate.

    `match_rms_adamw`, 0.2 sqrt(max(out, in)), gives the update the root mean square of a usual AdamW update, so that
    AdamW's rates and decay fit (arXiv 2502.16982, section 2.2). `original`, sqrt(max(1, out / in)), is Keller Jordan's.
    """
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out_features, in_features))
    return math.sqrt(max(1.0, out_features / in_features))


class Muon(torch.optim.Optimizer):
    """Muon for some groups and another optimizer for the rest, as one optimizer.

    The state of a matrix is `momentum_buffer`; the state of other parameters is the other optimizer's.

    Args:
        groups: groups of weights (out, in) or stacked weights (E, out, in), each with `lr` and `weight_decay`.
        others: the optimizer of all other parameters.
        momentum, nesterov, ns_steps, scale_rule, cautious: as in `MuonSection`.
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
        # load_state_dict replaces groups and state, so each step hands the other optimizer its part of them.
        self._others.state = self.state
        self._others.param_groups = self.param_groups[self._num_groups :]
        self._others.step()
        for group in self.param_groups[: self._num_groups]:
            for parameters in _calls([p for p in group["params"] if p.grad is not None]):
                self._update(parameters, group["lr"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update parameters that all have one shape or its transpose."""
        # FSDP2 shards a weight's rows or its experts, and only a whole matrix can be orthogonalized: every rank gathers
        # it, does the same arithmetic, and keeps its own part.
        wide = [_as_wide(whole(self._direction(parameter))) for parameter in parameters]
        joined_NRC = wide[0] if len(wide) == 1 else torch.cat(wide)
        updates_NRC = orthogonalize(joined_NRC, self._ns_steps, self._dtype)
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
        """Add this step's gradient to the momentum and return it. It is a mean: `orthogonalize` rescales it anyway."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - self._momentum)
        return parameter.grad.lerp(mean, self._momentum) if self._nesterov else mean


def _calls(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split parameters into those that are orthogonalized in one call, by their shapes."""
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
    """View (out, in) or (E, out, in) as (1 or E, R, C) with R <= C: the products of a step then have R rows."""
    matrices = weights.view(-1, *weights.shape[-2:])
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
