"""The arithmetic of Muon and NorMuon: momentum whose matrices are orthogonalized before they become an update.

torch.optim.Muon has the same arithmetic for single 2-D weights in bf16. This one also takes stacked experts, shards
of FSDP2 and devices without fast bf16, and orthogonalizes many small matrices in one call.

Shapes: N matrices of R rows and C columns, R <= C; E experts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightlm.optim.cautious import cautious_decay_
from lightlm.optim.polar_express import Quintic, quintics
from lightlm.sharding import like_parameter, whole

# The quintic of Keller Jordan's post, chosen for its slope at zero: five steps map singular values between 0.002 and 1
# of the norm into the range from 0.68 to 1.20. They never converge to 1; the post found no loss from that.
QUINTIC: Quintic = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7  # least norm; torch.optim.Muon's
_NEURON_EPS = 1e-10  # added to NorMuon's root mean squares, whose usual size is 1 / sqrt(columns)

# Most elements orthogonalized in one call. Milliseconds for 24 matrices on a CPU core with AMX, one by one, in calls of
# at most 2**20 elements, and all at once (benchmarks/orthogonalize.py):
#     64 x 64     8.1  0.8  0.8
#     256 x 768    37   33   32
#     576 x 1536  260  255  420
# An accelerator wants few large calls: 2**24 elements are 19 matrices of 576 x 1536. By count, they take 0.2 GB beside
# the optimizer's state.
_CALL_ELEMENTS = {"cpu": 2**20}
_ACCELERATOR_CALL_ELEMENTS = 2**24


def polynomials(method: str, steps: int) -> tuple[Quintic, ...]:
    """Return the coefficients (a, b, c) of each step: a x + b x^3 + c x^5 of the singular values."""
    return quintics(steps) if method == "polar_express" else (QUINTIC,) * steps


def orthogonalize(matrices_NRC: Tensor, steps: Sequence[Quintic], dtype: torch.dtype) -> Tensor:
    """Return roughly U V^T of each matrix U S V^T, by these polynomials in `dtype`."""
    norms_N11 = torch.linalg.vector_norm(matrices_NRC, dim=(-2, -1), keepdim=True)
    x = (matrices_NRC / norms_N11.clamp(min=_EPS)).to(dtype)
    if len(x) > 1:
        for a, b, c in steps:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    x = x[0]  # on a CPU in bf16, a batch of one is a third slower than plain products
    for a, b, c in steps:
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
        groups: groups of weights (out, in) or stacked weights (E, out, in), each with `lr`, `weight_decay` and
            `momentum`, which may change between steps.
        others: the optimizer of all other parameters.
        steps: see `polynomials`.
        nesterov, scale_rule, cautious: as in `MuonSection`.
        dtype: precision of the orthogonalization; bf16 is enough where it is fast.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        others: torch.optim.Optimizer,
        *,
        steps: Sequence[Quintic],
        nesterov: bool,
        scale_rule: str,
        cautious: bool,
        dtype: torch.dtype,
    ) -> None:
        assert all(parameter.ndim in (2, 3) for group in groups for parameter in group["params"])
        self._others, self._num_groups = others, len(groups)
        self._steps, self._nesterov = steps, nesterov
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
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters that all have one shape or its transpose."""
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        # FSDP2 shards a weight's rows or its experts, and only a whole matrix can be orthogonalized: every rank gathers
        # it, does the same arithmetic, and keeps its own part.
        wide = [_as_wide(whole(self._direction(parameter, group["momentum"]))) for parameter in parameters]
        joined_NRC = wide[0] if len(wide) == 1 else torch.cat(wide)
        updates_NRC = orthogonalize(joined_NRC, self._steps, self._dtype)
        parts = updates_NRC.split([len(matrices) for matrices in wide])
        for parameter, part_NRC in zip(parameters, parts, strict=True):
            rows, columns = parameter.shape[-2:]
            update = (part_NRC.mT if rows > columns else part_NRC).reshape(parameter.shape)
            update = like_parameter(self._normalize(update, parameter), parameter)
            if self._cautious:
                cautious_decay_(parameter, update, decay)
            else:
                parameter.mul_(1 - decay)
            parameter.add_(update, alpha=-lr * update_scale(self._scale_rule, rows, columns))

    def _normalize(self, update: Tensor, parameter: Tensor) -> Tensor:
        """Return the update of a whole parameter, after its orthogonalization."""
        return update

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Add this step's gradient to the momentum and return it. It is a mean: `orthogonalize` rescales it anyway."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum) if self._nesterov else mean


class NorMuon(Muon):
    """Muon whose updates have about the same size in each neuron, which is a row (arXiv 2510.05491).

    Each row of an update is divided by the root of a running mean of its squares. The whole matrix is then scaled to
    the root mean square that an orthogonal matrix has, so that Muon's learning rates fit. That also cancels the bias
    of the first means, which is the same factor in all rows. The state of a matrix also has `second_moment`, one
    number per row, sharded as the matrix is.

    Args:
        beta2: share of the running mean that a step keeps.
        arguments: Muon's.
    """

    def __init__(self, *arguments: Any, beta2: float, **settings: Any) -> None:
        self._beta2 = beta2
        super().__init__(*arguments, **settings)

    def _normalize(self, update: Tensor, parameter: Tensor) -> Tensor:
        update, state = update.float(), self.state[parameter]
        squares = update.square().mean(dim=-1, keepdim=True)
        mean = whole(state["second_moment"]) if "second_moment" in state else torch.zeros_like(squares)
        mean = mean.lerp(squares, 1 - self._beta2)
        state["second_moment"] = like_parameter(mean, parameter)
        update = update / (mean.sqrt() + _NEURON_EPS)
        rows, columns = update.shape[-2:]
        norms = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        return update * (math.sqrt(min(rows, columns)) / norms.clamp(min=_EPS))


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
