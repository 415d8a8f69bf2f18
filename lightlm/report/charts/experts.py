"""The plots of a mixture of experts, from `moe/` in metrics.jsonl (docs/metrics.md)."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from lightlm.report.charts.chart import MUTED, PLOT_HEIGHT, RUNS, Chart
from lightlm.report.charts.drawing import Plot, curve, empty_chart, label
from lightlm.report.curves import Floats, focus, smooth
from lightlm.report.record import Record

_HEAT_RUNS = 4  # runs whose loads get plots of their own
_HEAT_COLORS = [RUNS[1][0], "#f7f7f5", RUNS[0][0]]  # too little, balanced, too much
_MOMENTS = 200  # parts of a run over which values by layer are averaged, such as the columns of a heat map
_TALLEST = 7.0  # inches
_EXPERT_ROW = 0.0134  # inches per expert in a heat map over time: two pixels of the PNG
_LAYER_ROW = 0.14  # inches per layer in a heat map of one step
_EXPECTED_ZERO = {
    "moe/dead_experts": "Experts, over all layers, that got no token of a step.",
    "moe/dropped": "Choices of experts that were not computed.",
}


class _Balance(NamedTuple):
    """A metric that every layer has: `moe/<key>` is its mean over layers, `moe/layer_<key>` the list of all layers.

    Args:
        worst: ending of the key of the worst layer's value. Empty if `moe/<key>` is that value, and there is no mean.
        span: the balanced value, and a value that the axis always includes.
    """

    key: str
    worst: str
    title: str
    unit: str
    span: tuple[float, float]


_BALANCES = {
    _Balance("violation", "_worst", "Load imbalance", "equal shares", (0.0, 0.5)): (
        "Tokens of a layer's busiest expert over an equal share, minus 1 (MaxVio, arXiv 2408.15664). At 0 all experts "
        "get equally many tokens; at 1 the busiest gets twice its share."
    ),
    _Balance("entropy", "_lowest", "Load entropy", "share of log E", (1.0, 0.95)): (
        "Entropy of a layer's loads over that of equal shares: 1 is balanced."
    ),
    _Balance("bias_range", "", "Range of the selection bias", "scores", (0.0, 0.01)): (
        "Largest minus smallest bias of a layer; scores lie between 0 and 1."
    ),
}


def expert_plots(records: Sequence[Record]) -> Iterator[Plot]:
    """Draw balance over tokens, loads over time, and the newest loads of each layer's experts."""
    drawn = set()
    for balance, caption in _BALANCES.items():
        yield _balance(records, balance, caption)
        drawn |= {f"moe/{balance.key}", f"moe/{balance.key}{balance.worst}"}
    for key in dict.fromkeys(key for record in records for key in record.curves.keys("moe/")):
        if key not in drawn and not (key in _EXPECTED_ZERO and _always_zero(records, key)):
            yield _other(records, key)
    for i, record in enumerate(records[:_HEAT_RUNS]):
        yield from _load_maps(record, i if len(records) > 1 else None)


def _always_zero(records: Sequence[Record], key: str) -> bool:
    return not any(np.nan_to_num(record.curves.column(key)).any() for record in records)


def _balance(records: Sequence[Record], balance: _Balance, caption: str) -> Plot:
    """Draw the layers of a single run, their mean and the worst; for several runs, the mean and the worst (dotted)."""
    chart = empty_chart(records, balance.title, balance.unit)
    several = len(records) > 1
    dots = (0, (1, 1.2)) if several and balance.worst else None
    shown = []
    for i, record in enumerate(records):
        tokens = record.curves.tokens
        if not several and (layers := record.curves.arrays(f"moe/layer_{balance.key}")) is not None:
            ends, values_ML = _by_moment(tokens[layers[0]], layers[1])
            for values in values_ML.T:
                chart.faint(ends, values, i)
            shown.append(values_ML.ravel())
        worst = record.curves.column(f"moe/{balance.key}{balance.worst}")
        if balance.worst:
            worst, mean = smooth(worst), smooth(record.curves.column(f"moe/{balance.key}"))
            chart.line(label(records, record, "mean of the layers"), tokens, mean, i)
        chart.line(label(records, record, "worst layer"), tokens, worst, i if several else 1, style=dots)
        shown += [worst, np.array(balance.span)]
    if limits := focus(shown):
        chart.axes.set_ylim(*limits)
    key = " Dots: the worst layer." if dots else " Faint: each layer." if not several else ""
    return Plot(f"moe_{balance.key}", caption + key, chart)


def _other(records: Sequence[Record], key: str) -> Plot:
    words = key.removeprefix("moe/").replace("_", " ").replace("/", ", ")
    chart = empty_chart(records, f"Experts: {words}", words)
    for i, record in enumerate(records):
        tokens, values = record.curves.tokens, record.curves.column(key)
        if np.array_equal(values, np.round(values), equal_nan=True):  # counts are not smoothed
            chart.line(record.name, tokens, values, i)
        else:
            curve(chart, records, i, tokens, values)
    return Plot(key.replace("/", "_"), _EXPECTED_ZERO.get(key, ""), chart)


def _load_maps(record: Record, number: int | None) -> Iterator[Plot]:
    """Draw loads as multiples of an equal share over the run, and those of its newest step."""
    if (found := record.curves.arrays("moe/load")) is None:
        return
    indices, load_SLE = found
    relative_SLE = load_SLE / load_SLE.mean(axis=2, keepdims=True)
    _, num_layers, num_experts = load_SLE.shape
    model = record.recipe.get("model") or {}
    first = int(model.get("first_k_dense", 0)) * int(model.get("layer_sharing", 1))  # layer with experts, of all layers
    layers = (first + num_layers - 0.5, first - 0.5)
    ending, named = ("", "") if number is None else (f"_{number}", f", {record.name}")

    ends, relative_MLE = _by_moment(record.curves.tokens[indices], relative_SLE)
    # In each layer the busiest expert is on top: unsorted rows of two pixels would look like noise.
    order_1LE = relative_MLE.mean(axis=0, keepdims=True).argsort(axis=2)[:, :, ::-1]
    rows_RM = np.take_along_axis(relative_MLE, order_1LE, axis=2).reshape(len(ends), -1).T
    height = len(rows_RM) * _EXPERT_ROW
    chart = _map(f"Expert load over time{named}", "training tokens", height, rows_RM, (0, float(ends[-1]), *layers))
    for layer in range(first + 1, first + num_layers):
        chart.axes.axhline(layer - 0.5, color=MUTED[0], linewidth=0.5)
    chart.quantities("x")
    caption = "Each layer's experts, the busiest on top, in multiples of an equal share: 1 is balanced."
    for key in _EXPECTED_ZERO:
        if record.curves.keys(key) and _always_zero([record], key):
            caption += f" {key.removeprefix('moe/').replace('_', ' ').capitalize()}: none in any step."
    yield Plot(f"moe_load_over_time{ending}", caption, chart)

    extent = (-0.5, num_experts - 0.5, *layers)
    chart = _map(f"Expert load{named}", "expert", num_layers * _LAYER_ROW, relative_SLE[-1], extent)
    chart.axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    step = int(record.curves.steps[indices[-1]])
    caption = f"Tokens of step {step:,}, in multiples of an equal share: 1 is balanced, 0 is a dead expert."
    yield Plot(f"moe_load{ending}", caption, chart)


def _by_moment(tokens_S: Floats, values_S: Floats) -> tuple[Floats, Floats]:
    """Divide the run into equal parts; return their ends in tokens and the mean of each part's values.

    A part without values takes those of the next step, whose batch it lies in.
    """
    edges = np.linspace(0, tokens_S[-1], _MOMENTS + 1)
    bounds = np.searchsorted(tokens_S, edges, side="right")
    means = [values_S[start : max(stop, start + 1)].mean(axis=0) for start, stop in itertools.pairwise(bounds)]
    return edges[1:], np.stack(means)


def _map(title: str, x_label: str, height: float, relative: Floats, extent: tuple[float, float, float, float]) -> Chart:
    """Draw a heat map of loads in multiples of an equal share, layer under layer; `extent` as of `imshow`."""
    chart = Chart(title, x_label, "layer", height=min(max(height, PLOT_HEIGHT), _TALLEST))
    colors = LinearSegmentedColormap.from_list("load", _HEAT_COLORS)
    image = chart.axes.imshow(relative, cmap=colors, vmin=0, vmax=2, aspect="auto", interpolation="none", extent=extent)
    chart.axes.grid(False)
    chart.axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    chart.color_bar(image)
    return chart
