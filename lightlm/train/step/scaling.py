"""Loss scaling for float16, whose smallest numbers gradients would fall below (arXiv 1710.03740).

A batch whose gradients overflow is computed again with half the scale, so no step is lost. Scales are powers of two:
where nothing overflows or vanishes, they do not change a gradient. They begin at 2**16, as torch's GradScaler.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

_FIRST = 2.0**16
_GROWS_AFTER = 2000  # batches in a row without an overflow, as in torch's GradScaler


@dataclass(frozen=True)
class ScaleState:
    """What a checkpoint keeps, so that a resumed run repeats the same scales."""

    scale: float = 0.0  # 0 in a run whose products are not float16
    good: int = 0  # batches since the scale changed
    retries: int = 0  # batches computed again, over the whole run


class LossScale:
    """The factor of a run's loss, the same in all processes; 1 unless products are float16.

    Args:
        state: of the checkpoint that the run resumes from; that of a new run unless given.
    """

    def __init__(self, dtype: torch.dtype, state: ScaleState | None = None) -> None:
        self.active = dtype == torch.float16
        state = state or ScaleState()
        # A run in another precision may continue in float16.
        self.state = replace(state, scale=state.scale or _FIRST) if self.active else state

    def __call__(self, objective: Tensor) -> Tensor:
        """Return the objective to call `backward` on."""
        return objective * self.state.scale if self.active else objective

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.active and (gradients := [p.grad for p in parameters if p.grad is not None]):
            torch._foreach_mul_(gradients, 1 / self.state.scale)

    def accept(self, *, finite: bool) -> bool:
        """Return whether to use these gradients; if not, the scale is halved, and the batch is computed again.

        With a scale of 1, gradients that are not finite are the model's own.
        """
        if not self.active:
            return True
        scale, good, retries = self.state.scale, self.state.good + 1, self.state.retries
        if not finite and scale > 1:
            self.state = ScaleState(scale / 2, 0, retries + 1)
            return False
        grows = finite and good >= _GROWS_AFTER
        self.state = replace(self.state, scale=2 * scale if grows else scale, good=0 if grows else good)
        return True
