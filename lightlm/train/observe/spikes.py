"""Loss spikes: steps whose loss or gradient norm is far above that of the steps before them.

A spike lies more than `train.spike_threshold` robust standard deviations above the median of the last
`train.spike_window` steps. OLMo-core's SkipStepOptimizer uses mean and standard deviation (6 over 128 steps); a few
spikes in the window do not move the median and the median absolute deviation.
`train.skip_spikes` drops the gradients of such a step (PaLM, arXiv 2204.02311, section 5.1, skips the batches around a
spike): its batch is consumed and the step counts, but weights and optimizer do not change.

The judgment depends only on loss and norm of the global batch, which are equal on all ranks, and on the history, which
is part of the training state. So all ranks agree, and a resumed run repeats it.
"""

import math
from dataclasses import dataclass, replace
from statistics import median

from lightlm.recipe import TrainSection

MAX_IN_A_ROW = 10  # spikes skipped in a row; after them a finite loss is the new level, and NaN ends the run
_NORMAL = 1.4826  # median absolute deviation to standard deviation, for a normal distribution
# The least deviation, as a share of the median: otherwise a loss that hardly varies (large batch, memorized text) makes
# spikes of noise. With the default threshold of 6 a value within 6% of the median is never a spike.
_LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class SpikeHistory:
    """The finite values of the last steps, oldest first, to which the next step is compared."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    in_a_row: int = 0  # spikes up to and including the last step


@dataclass(frozen=True)
class Verdict:
    """What to do with a step.

    `reason` says why it is a spike and is empty if it is not one. `diverged`: the run cannot continue.
    """

    reason: str
    skip: bool
    diverged: bool
    history: SpikeHistory


def judge(before: SpikeHistory, loss: float, norm: float, train: TrainSection) -> Verdict:
    """Compare a step's loss and gradient norm (before clipping) with the steps before it.

    A loss or norm that is NaN or infinite is always a spike; others are judged once half the window is filled.
    """
    reason = f"loss {loss}, gradient norm {norm}"
    if finite := math.isfinite(loss) and math.isfinite(norm):
        found = (_excess("loss", loss, before.losses, train), _excess("gradient norm", norm, before.norms, train))
        reason = ", ".join(filter(None, found))
    history = replace(before, in_a_row=before.in_a_row + 1 if reason else 0)
    if finite:  # a spike enters the history too, so that a lasting change becomes normal
        losses, norms = ((*before.losses, loss), (*before.norms, norm))
        history = replace(history, losses=losses[-train.spike_window :], norms=norms[-train.spike_window :])
    skip = train.skip_spikes and bool(reason) and history.in_a_row <= MAX_IN_A_ROW
    return Verdict(reason, skip, diverged=not finite and not skip, history=history)


def _excess(name: str, value: float, recent: tuple[float, ...], train: TrainSection) -> str:
    """Return a description of how far a value stands out, or an empty string."""
    recent = recent[-train.spike_window :]
    if len(recent) < train.spike_window // 2:
        return ""
    center = median(recent)
    deviation = max(_NORMAL * median(abs(other - center) for other in recent), _LEAST_DEVIATION * abs(center))
    if value - center <= train.spike_threshold * deviation:
        return ""
    return f"{name} {value:.4g}, median of the last {len(recent)} steps {center:.4g} ± {deviation:.2g}"
