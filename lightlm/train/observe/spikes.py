"""Loss spikes: steps whose loss or gradient norm stands far above those before them.

A value is a spike when it lies more than `train.spike_threshold` robust standard deviations above the median of the
last `train.spike_window` steps; OLMo-core's SkipStepOptimizer does the same with mean and standard deviation, 6 of
them over 128 steps. The median and the median absolute deviation are not moved by a few spikes within the window.
With `train.skip_spikes` such a step's gradients are dropped (PaLM, arXiv 2204.02311, section 5.1, skips the batches
around a spike): its batch is consumed and the step counts, the weights and the optimizer stay as they were.

The judgement is a function of the loss and norm of the global batch, which are equal on all ranks, and of the
history, which is part of the training state: so ranks agree, and a resumed run repeats it.
"""

import math
from dataclasses import dataclass
from statistics import median

from lightlm.recipe import TrainSection

MAX_IN_A_ROW = 10  # spikes skipped one after the other; then a finite loss is the run's new level, and NaN its end
_NORMAL = 1.4826  # median absolute deviation to standard deviation, for a normal distribution
# Of the median, the least deviation assumed: a loss that hardly varies (a large batch, a memorised text) would make
# spikes of nothing. With the default threshold of 6 no value within 6% of the median is one.
_LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class SpikeHistory:
    """What the next step is compared with: the finite values of the last steps, oldest first."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    in_a_row: int = 0  # spikes up to and including the last step

    def after(self, loss: float, norm: float, spike: bool, window: int) -> "SpikeHistory":
        """The history with one more step. A spike enters it too, or a lasting change of level would never end."""
        in_a_row = self.in_a_row + 1 if spike else 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return SpikeHistory(self.losses, self.norms, in_a_row)
        return SpikeHistory((*self.losses, loss)[-window:], (*self.norms, norm)[-window:], in_a_row)


@dataclass(frozen=True)
class Verdict:
    """What to do with a step.

    `reason` says in words why it is a spike, and is empty where it is none. `diverged`: there is nothing to go on with.
    """

    reason: str
    skip: bool
    diverged: bool
    history: SpikeHistory

    @property
    def spike(self) -> bool:
        return bool(self.reason)


def judge(before: SpikeHistory, loss: float, norm: float, train: TrainSection) -> Verdict:
    """Compare a step's loss and gradient norm (before clipping) with the steps before it.

    A loss or norm that is no number is always a spike; others are judged once half the window is known.
    """
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        found = (
            _excess("loss", loss, before.losses, train),
            _excess("gradient norm", norm, before.norms, train),
        )
        reason = ", ".join(part for part in found if part)
    else:
        reason = f"loss {loss}, gradient norm {norm}"
    history = before.after(loss, norm, bool(reason), train.spike_window)
    skip = train.skip_spikes and bool(reason) and history.in_a_row <= MAX_IN_A_ROW
    return Verdict(reason, skip, diverged=not finite and not skip, history=history)


def _excess(name: str, value: float, recent: tuple[float, ...], train: TrainSection) -> str:
    """How far a value stands out, in words; nothing where it does not."""
    recent = recent[-train.spike_window :]
    if len(recent) < train.spike_window // 2:
        return ""
    centre = median(recent)
    deviation = max(_NORMAL * median(abs(other - centre) for other in recent), _LEAST_DEVIATION * abs(centre))
    if value - centre <= train.spike_threshold * deviation:
        return ""
    return f"{name} {value:.4g}, median of the last {len(recent)} steps {centre:.4g} ± {deviation:.2g}"
