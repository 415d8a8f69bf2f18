"""A run's metrics as columns: one entry per step, NaN where a step lacks the metric."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SMOOTHING_SHARE = 1 / 30  # of a run's steps in the moving average
_YOUNG_SHARE = 1 / 10  # of the values so far that the average may cover
_HEAD_SHARE = 1 / 10  # of a run, its initial fall, that does not set the limits of a loss axis
_SHORT = 20  # steps; shorter runs are shown whole


class Curves:
    """The columns of `metrics.jsonl`.

    Args:
        rows: the file's objects. Those without `step` and `tokens` are skipped.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = [row for row in rows if _is_number(row, "step") and _is_number(row, "tokens")]
        self.steps = self.column("step")
        self.tokens = self.column("tokens")
        self.seconds = self.column("seconds")

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, key: str) -> Floats:
        """Return this metric of every step; NaN where it is missing, infinite or not a number."""
        values = (row[key] if _is_number(row, key) else math.nan for row in self._rows)
        column = np.fromiter(values, dtype=np.float64, count=len(self._rows))
        column[np.isinf(column)] = math.nan
        return column

    def flagged(self, key: str) -> NDArray[np.bool_]:
        """Return for every step whether a flag such as `spike` is set."""
        return np.array([bool(row.get(key)) for row in self._rows], dtype=bool)

    def lost(self, key: str) -> int:
        """Count the steps that report this metric without a finite value."""
        return int(np.isnan(self.column(key)).sum()) - sum(key not in row for row in self._rows)

    def keys(self, prefix: str = "") -> list[str]:
        """Return the metrics with this prefix that have a finite value in some step, in order of appearance."""
        found = dict.fromkeys(key for row in self._rows for key in row if key.startswith(prefix))
        return [key for key in found if np.isfinite(self.column(key)).any()]

    def last(self, key: str) -> float | None:
        """Return the newest finite value."""
        return newest(self.column(key))

    def arrays(self, key: str) -> tuple[NDArray[np.int64], Floats] | None:
        """Return a metric that is a list, such as the loads of experts by layer (layers x experts).

        Returns:
            The indices of the steps that have it, and its values (steps, ...); None if no step has any.
        """
        found = {i: row[key] for i, row in enumerate(self._rows) if row.get(key)}
        return (np.array(list(found)), np.array(list(found.values()), dtype=np.float64)) if found else None


def newest(column: Floats) -> float | None:
    """Return the last finite value."""
    finite = column[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else None


def _is_number(row: Any, key: str) -> bool:
    return isinstance(row, dict) and isinstance(row.get(key), int | float) and not isinstance(row[key], bool)


def smooth(values: Floats, window: float | None = None) -> Floats:
    """Return the exponential moving average, unbiased from the first value on (Adam's correction, arXiv 1412.6980).

    NaN stays NaN and does not count. Near the start the average covers only a tenth of the values so far: a longer one
    would trail far behind the steep fall that every run begins with.

    Args:
        window: number of steps in the average; a thirtieth of the run unless given.
    """
    window = len(values) * _SMOOTHING_SHARE if window is None else window
    total = weight = 0.0
    seen = 0
    result = np.full_like(values, math.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            seen += 1
            decay = 1 - 1 / max(min(window, seen * _YOUNG_SHARE), 1.0)
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
            result[i] = total / weight
    return result


def focus(lines: Sequence[Floats]) -> tuple[float, float] | None:
    """Return limits for a loss axis that the initial fall does not dominate; None if there is nothing to show.

    The first tenth of each line and its outermost half percent on either side do not count, unless the line is short.
    """
    limits = []
    for line in lines:
        finite = line[np.isfinite(line)]
        short = len(finite) < _SHORT
        if len(finite):
            tail = finite if short else finite[int(len(finite) * _HEAD_SHARE) :]
            limits.append(np.percentile(tail, (0, 100) if short else (0.5, 99.5)))
    if not limits:
        return None
    low, high = float(np.min(limits)), float(np.max(limits))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
