"""Parts that all plots of a report share: axes, curves, and names of runs in the legend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightlm.report.charts.chart import Chart
from lightlm.report.curves import Floats, smooth
from lightlm.report.record import Record

_RAW_RUNS = 3  # more runs than this are drawn without their raw values


@dataclass(frozen=True)
class Plot:
    """A plot of a report. `name` is its file's name, unique in a report."""

    name: str
    caption: str
    chart: Chart


@dataclass(frozen=True)
class Axis:
    """An x axis: its label, and each run's values."""

    label: str
    of: Callable[[Record], Floats]


TOKENS = Axis("training tokens", lambda record: record.curves.tokens)


def highest(columns: Sequence[Floats], percentile: float = 100.0) -> float:
    """Return the largest finite value, or the largest of the columns' percentiles; 0 if there is none."""
    finite = (column[np.isfinite(column)] for column in columns)
    return max((float(np.percentile(values, percentile)) for values in finite if len(values)), default=0.0)


def empty_chart(records: Sequence[Record], title: str, y_label: str, axis: Axis = TOKENS) -> Chart:
    """Return a chart whose x axis spans the longest run, so that all plots can be read side by side.

    Resumes are marked if there is one run.
    """
    resumes: list[float] = []
    if len(records) == 1:
        steps = np.flatnonzero(records[0].curves.flagged("resumed"))
        resumes = [float(x) for x in axis.of(records[0])[steps[steps > 0] - 1] if np.isfinite(x)]
    chart = Chart(title, axis.label, y_label, name_all=len(records) > 1, resumes=resumes)
    chart.axes.set_xlim(0, highest([axis.of(record) for record in records]) * 1.03 or 1.0)
    chart.quantities("x")
    return chart


def label(records: Sequence[Record], record: Record, what: str) -> str:
    """Return a legend entry: what the line is if there is one run, else the run's name."""
    return what if len(records) == 1 else record.name


def curve(
    chart: Chart, records: Sequence[Record], i: int, x: Floats, y: Floats, what: str = "smoothed"
) -> list[Floats]:
    """Draw a smoothed curve, with its raw values behind it if there are few runs; return what was drawn."""
    smoothed = smooth(y)
    chart.line(label(records, records[i], what), x, smoothed, i)
    if len(records) > _RAW_RUNS:
        return [smoothed]
    chart.faint(x, y, i)
    return [smoothed, y]
