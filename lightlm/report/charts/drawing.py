"""What the figures of a report have in common: their axes, their curves, and how runs are told apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightlm.report.charts.chart import Chart
from lightlm.report.charts.curves import Floats, smooth, smoothing_window
from lightlm.report.record import Record

_RAW_RUNS = 3  # up to which the unsmoothed values are drawn behind the curves


@dataclass(frozen=True)
class Plot:
    """A finished figure; `name` is its file's, and unique in a report."""

    name: str
    caption: str
    chart: Chart


@dataclass(frozen=True)
class Axis:
    """What the figures have along x."""

    label: str
    of: Callable[[Record], Floats]
    quantities: bool


TOKENS = Axis("training tokens", lambda record: record.curves.tokens, True)


def runs_with(records: Sequence[Record], key: str) -> list[tuple[int, Record]]:
    """The runs with this metric, each with its number, which is its colour."""
    return [(i, record) for i, record in enumerate(records) if np.isfinite(record.curves.column(key)).any()]


def empty_chart(records: Sequence[Record], title: str, y_label: str, axis: Axis = TOKENS) -> Chart:
    """A figure over tokens or time, as far as the longest run goes, so that all figures can be read together."""
    chart = Chart(title, axis.label, y_label, name_all=len(records) > 1)
    chart.from_zero("x", max(float(np.nanmax(axis.of(record), initial=0.0)) for record in records))
    if axis.quantities:
        chart.quantities("x")
    return chart


def label(records: Sequence[Record], record: Record, what: str) -> str:
    """Of one run the legend says what a line is, of several which run's it is."""
    return what if len(records) == 1 else record.name


def curve(chart: Chart, records: Sequence[Record], i: int, x: Floats, y: Floats, what: str) -> list[Floats]:
    """A smoothed curve, and the raw values behind it while there are few runs; what the limits should fit."""
    smoothed = smooth(y, smoothing_window(len(y)))
    chart.line(label(records, records[i], what), x, smoothed, i)
    if len(records) > _RAW_RUNS:
        return [smoothed]
    chart.line("", x, y, i, faint=True)
    return [smoothed, y]
