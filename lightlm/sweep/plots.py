"""The plots of a sweep: the metric by value, and learning curves with the range of the seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator

from lightlm.quantities import parse_quantity
from lightlm.report.charts.chart import PLOT_HEIGHT, Chart, compute_unit, write_charts
from lightlm.report.curves import Curves, Floats, focus, smooth
from lightlm.sweep.cells import short_keys
from lightlm.sweep.table import Line, Results

_CURVES = 12  # contestants in a plot of learning curves: the best ones
_DECADE, _THOUSAND = 10.0, 1000.0
_TICKS = 9  # values that are ticks of their own
_ROW = 0.3  # inches per contestant in a plot by name
_CHARACTER = 0.1  # inches of a name's letter
_UNITS = {"val_loss": "validation loss (nats per token)", "loss": "training loss (nats per token)"}
_UNITS["val_bpb"] = "validation, bits per byte"
_MEASURED = 1.02  # seconds per token that differ by less are not worth a plot of their own


@dataclass(frozen=True)
class Bundle:
    """The curves of one contestant, a pair (x, y) per seed."""

    name: str
    curves: list[tuple[Floats, Floats]]


def write_plots(results: Results) -> dict[str, Path]:
    """Draw what there are runs for, as plots/NAME.png in the sweep's folder; return the files."""
    charts = {"values": values_chart(results), **_learning_curves(results)}
    drawn = {name: chart.finish() for name, chart in charts.items() if chart is not None and chart.axes.has_data()}
    return write_charts(results.folder / "plots", drawn, replace=True)


def values_chart(results: Results) -> Chart | None:
    """Return a plot of the metric by value: over a key of numbers if there is one, else by name."""
    lines = [line for line in results.lines if line.finals]
    if not lines:
        return None
    key = _number_key(lines)
    return _by_name(results, lines) if key is None else _by_number(results, lines, key)


def _number_key(lines: Sequence[Line]) -> str | None:
    """Return the key with the most values if all are numbers; the first of several."""
    columns: dict[str, set[float]] = {}
    for key in dict.fromkeys(key for line in lines for key in line.contestant.values):
        numbers = [_number(line.contestant.values.get(key, "")) for line in lines]
        if None not in numbers:
            columns[key] = {number for number in numbers if number is not None}
    best = max(columns, key=lambda key: len(columns[key]), default=None)
    return best if best is not None and len(columns[best]) > 1 else None


def _number(text: str) -> float | None:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        pass
    try:
        return float(parse_quantity(text))
    except ValueError:
        return float(text[:-1]) if text.endswith("%") and text[:-1].replace(".", "", 1).isdigit() else None


def _by_number(results: Results, lines: Sequence[Line], key: str) -> Chart:
    """Draw a curve over a key's values for each combination of the other keys."""
    others = [other for other in dict.fromkeys(k for line in lines for k in line.contestant.values) if other != key]
    names = short_keys(others)
    groups: dict[str, list[tuple[float, Line]]] = {}
    for line in lines:
        values = line.contestant.values
        group = " ".join(f"{names[other]}={values[other]}" for other in others if other in values)
        number = _number(values[key])
        assert number is not None  # `_number_key` has read it
        groups.setdefault(group, []).append((number, line))
    title = f"{results.folder.name}: {results.metric} by {key}"
    spread = any(line.std is not None for line in lines)
    chart = Chart(title, key, _label(results.metric), name_all=spread)
    written = {number: line.contestant.values[key] for points in groups.values() for number, line in points}
    for index, (group, points) in enumerate(groups.items()):
        points.sort(key=lambda point: point[0])
        x = np.array([number for number, _ in points])
        means = np.array([line.mean for _, line in points])
        errors = np.array([math.nan if line.std is None else line.std for _, line in points])
        chart.dots(x, [list(line.finals.values()) for _, line in points], index)
        chart.line(group or "mean and standard deviation of the seeds (dots)", x, means, index)
        chart.errors(x, means, errors, index)
    if min(written) > 0 and max(written) >= _DECADE * min(written):
        chart.axes.set_xscale("log")
        chart.axes.xaxis.set_minor_locator(NullLocator())
    if len(written) <= _TICKS:
        chart.axes.set_xticks(list(written), list(written.values()))
    elif min(written) >= _THOUSAND:
        chart.quantities("x")
    return chart


def _by_name(results: Results, lines: Sequence[Line]) -> Chart:
    """Draw a row for each contestant, in the order of the table."""
    left = min(_CHARACTER * max(len(line.contestant.name) for line in lines) + 0.3, 3.4)
    height = max(_ROW * len(lines) + 0.3, PLOT_HEIGHT / 2)
    title = f"{results.folder.name}: {results.metric}"
    if any(line.std is not None for line in lines):
        title += ", mean and standard deviation of the seeds"
    chart = Chart(title, _label(results.metric), "", height=height, left=left)
    for row, line in enumerate(lines):
        chart.row(row, list(line.finals.values()), line.std, 0)
    first = next((line.mean for line in lines if line.contestant.name == results.baseline), None)
    if first is not None:
        chart.vertical(first)
    widest = int((left - 0.3) / _CHARACTER)
    chart.rows([_short(line.contestant.name, widest) for line in lines])
    return chart


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _label(metric: str) -> str:
    return _UNITS.get(metric, metric)


def _learning_curves(results: Results) -> dict[str, Chart]:
    """Return the curves over tokens, and those over compute and time if they differ."""
    with_runs = [line.contestant.name for line in results.best_first() if results.curves[line.contestant.name]]
    chosen = [line.contestant.name for line in results.lines if line.contestant.name in with_runs[:_CURVES]]
    if not chosen:
        return {}
    runs = [(name, run) for name in chosen for run in results.curves[name].values() if len(run)]
    # A metric that is measured at the end only has no curve; the training loss has one.
    metric = results.metric if all(_values(run, results.metric) > 1 for _, run in runs) else None
    unit = _label(metric or "loss") + ("" if metric else ", smoothed")
    more = f", the best {_CURVES}" if len(chosen) < len(with_runs) else ""

    def chart(over: str, x_label: str, x: Callable[[str, Curves], Floats]) -> Chart:
        bundles = [
            Bundle(name, [_curve(run, x(name, run), metric) for run in results.curves[name].values()])
            for name in chosen
        ]
        return curves_chart(f"{results.folder.name}: learning curves{over}{more}", bundles, x_label, unit)

    charts = {"curves": chart("", "training tokens", lambda name, run: run.tokens)}
    charts["curves"].quantities("x")
    costs = [results.flops.get(name) for name in chosen]
    if None not in costs and len(set(costs)) > 1:
        size, name_of_unit = compute_unit(max(results.flops[name] * run.tokens[-1] for name, run in runs))
        charts["curves_over_compute"] = chart(
            " over compute", f"training {name_of_unit}", lambda name, run: run.tokens * results.flops[name] / size
        )
    speeds = [line.seconds / line.tokens for line in results.lines if line.seconds and line.tokens]
    if speeds and max(speeds) > _MEASURED * min(speeds):
        charts["curves_over_time"] = chart(" over time", "training time (s)", lambda name, run: run.seconds)
    return charts


def _values(run: Curves, metric: str) -> int:
    return int(np.isfinite(run.column(metric)).sum())


def _curve(run: Curves, x: Floats, metric: str | None) -> tuple[Floats, Floats]:
    y = smooth(run.column("loss")) if metric is None else run.column(metric)
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def curves_chart(title: str, bundles: Sequence[Bundle], x_label: str, y_label: str) -> Chart:
    """Return a plot with the mean curve of each contestant, and a band from its lowest to its highest seed."""
    chart, shown = Chart(title, x_label, y_label, name_all=True), []
    for index, bundle in enumerate(bundles):
        curves = [(x, y) for x, y in bundle.curves if len(x)]
        if not curves:
            continue
        # Seeds are measured at the same tokens; one that has stopped early ends the mean.
        length = min(len(x) for x, _ in curves)
        x_P = np.mean([x[:length] for x, _ in curves], axis=0)
        y_SP = np.array([y[:length] for _, y in curves])
        chart.line(bundle.name, x_P, y_SP.mean(0), index)
        if len(curves) > 1:
            chart.band(x_P, y_SP.min(0), y_SP.max(0), index)
        shown += list(y_SP)
    if limits := focus(shown):
        chart.axes.set_ylim(*limits)
    return chart
