"""A run's metrics as columns: one entry a step, NaN where a step has no such figure."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SMOOTHING_SHARE = 1 / 30  # of a run's steps that the moving average looks back over
_YOUNG_SHARE = 1 / 10  # of the values so far that the average may look back over
_HEAD_SHARE = 1 / 10  # of a run, its initial fall, that does not set the limits of a loss axis
_SHORT = 20  # steps under which all of a run is shown


class Curves:
    """The columns of `metrics.jsonl`.

    Where a step is there twice, as after a crash that went back to an older checkpoint, its last line counts. Time
    goes on where a resumed run's clock began again at zero.

    Args:
        rows: the file's objects; those without `step` and `tokens` are skipped.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = _without_repeats(row for row in rows if _is_number(row, "step") and _is_number(row, "tokens"))
        self.steps = self.column("step")
        self.tokens = self.column("tokens")
        self.seconds = _continuous(self.column("seconds"))

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, key: str) -> Floats:
        """The figure of every step; NaN where it is missing, no number, or infinite."""
        values = (row[key] if _is_number(row, key) else math.nan for row in self._rows)
        column = np.fromiter(values, dtype=np.float64, count=len(self._rows))
        column[np.isinf(column)] = math.nan
        return column

    def flagged(self, key: str) -> NDArray[np.bool_]:
        """The steps where a yes-or-no figure, such as `spike`, is true."""
        return np.array([bool(row.get(key)) for row in self._rows], dtype=bool)

    def lost(self, key: str) -> int:
        """How many steps report this figure but have no finite number for it."""
        return int(np.isnan(self.column(key)).sum()) - sum(key not in row for row in self._rows)

    def keys(self, prefix: str = "") -> list[str]:
        """The figures with this prefix that at least one step has as a finite number, in order of appearance."""
        found = dict.fromkeys(key for row in self._rows for key in row if key.startswith(prefix))
        return [key for key in found if np.isfinite(self.column(key)).any()]

    def last(self, key: str) -> float | None:
        """The newest finite figure."""
        return newest(self.column(key))

    def arrays(self, key: str, dimensions: int) -> tuple[NDArray[np.int64], Floats] | None:
        """Lists of numbers, such as the loads of experts by layer (layers x experts).

        Returns:
            The indices of the steps that have them, and the lists stacked (steps, ...); those of another shape than
            the newest are left out. None if no step has any.
        """
        found = []
        for i, row in enumerate(self._rows):
            if isinstance(row.get(key), list):
                try:
                    array = np.array(row[key], dtype=np.float64)
                except (ValueError, TypeError):
                    continue
                if array.ndim == dimensions and array.size and np.isfinite(array).all():
                    found.append((i, array))
        if not found:
            return None
        found = [(i, array) for i, array in found if array.shape == found[-1][1].shape]
        return np.array([i for i, _ in found]), np.stack([array for _, array in found])


def newest(column: Floats) -> float | None:
    """The last finite value."""
    finite = column[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else None


def _is_number(row: Any, key: str) -> bool:
    return isinstance(row, dict) and isinstance(row.get(key), int | float) and not isinstance(row[key], bool)


def _without_repeats(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _continuous(seconds: Floats) -> Floats:
    """A clock that never goes back: where it does, it began again at zero."""
    result, offset, before = seconds.copy(), 0.0, 0.0
    for i, value in enumerate(seconds):
        if np.isfinite(value):
            offset += before if value < before else 0.0
            before = value
            result[i] = value + offset
    return result


def smoothing_window(steps: int) -> float:
    """Steps that the average of a run of this length looks back over."""
    return max(steps * _SMOOTHING_SHARE, 1.0)


def smooth(values: Floats, window: float) -> Floats:
    """Exponential moving average over about `window` steps, unbiased from the first value on (Adam's correction,
    arXiv 1412.6980); NaN stays NaN and does not count.

    Where the curve is young the average is short, a tenth of the values so far: one of full length would trail far
    behind the steep fall that every run begins with.
    """
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


def thin(x: Floats, y: Floats, most: int = 1200) -> tuple[Floats, Floats]:
    """At most `most` points of a line that look the same: the lowest and the highest of each stretch.

    Two thirds of the stretches are of equal length, one third grows from a single point on, for logarithmic axes.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    edges = np.union1d(
        np.linspace(0, len(x), most // 3, dtype=int), np.geomspace(1, len(x) - 1, most // 6 - 1).astype(int)
    )
    kept = {0, len(x) - 1}
    for start, end in itertools.pairwise(edges):
        kept |= {start + int(np.argmin(y[start:end])), start + int(np.argmax(y[start:end]))}
    order = sorted(kept)
    return x[order], y[order]


def focus(lines: Sequence[Floats]) -> tuple[float, float] | None:
    """Limits of a loss axis in which the initial fall, which takes up most of the range, does not flatten the rest.

    Of each line the first tenth and the outermost half percent on either side do not count, unless it is short.
    None if there is nothing to show.
    """
    lows, highs = [], []
    for line in lines:
        finite = line[np.isfinite(line)]
        if not len(finite):
            continue
        tail = finite if len(finite) < _SHORT else finite[int(len(finite) * _HEAD_SHARE) :]
        low, high = (tail.min(), tail.max()) if len(finite) < _SHORT else np.percentile(tail, (0.5, 99.5))
        lows.append(float(low))
        highs.append(float(high))
    if not lows:
        return None
    low, high = min(lows), max(highs)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
