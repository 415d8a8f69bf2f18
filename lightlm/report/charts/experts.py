"""The plots of a mixture of experts, from `moe/` in metrics.jsonl (docs/metrics.md)."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axis import Axis as Ticks
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FixedLocator

from lightlm.report.charts.chart import MUTED, PLOT_HEIGHT, RUNS, Chart
from lightlm.report.charts.drawing import Plot, curve, empty_chart, label, runs_with
from lightlm.report.curves import Floats, focus, smooth
from lightlm.report.record import Record

_HEAT_RUNS = 4  # runs whose loads get plots of their own
_HEAT_COLORS = [RUNS[1][0], "#f7f7f5", RUNS[0][0]]  # too little, balanced, too much
_MOMENTS = 200  # parts of a run over which values by layer are averaged, such as the columns of a heat map
_TALLEST = 7.0  # inches
_EXPERT_ROW = 0.0134  # inches per expert in a heat map over time: two pixels of the PNG
_LAYER_ROW = 0.14  # inches per layer in a heat map of one step
_TICK = 0.24  # inches that a tick's number takes
_EXPECTED_ZERO = ("moe/dead_experts", "moe/dropped")


@dataclass(frozen=True)
class _Balance:
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
    caption: str


_BALANCES = (
    _Balance(
        "violation",
        "_worst",
        "Load violation",
        "equal shares",
        (0.0, 0.5),
        "Load of a layer's busiest expert beyond an equal share, in shares: 0 is balanced.",
    ),
    _Balance(
        "entropy",
        "_lowest",
        "Load entropy",
        "share of log E",
        (1.0, 0.95),
        "Entropy of a layer's loads over that of equal shares: 1 is balanced.",
    ),
    _Balance(
        "bias_range",
        "",
        "Range of the selection bias",
        "scores",
        (0.0, 0.01),
        "Largest minus smallest bias of a layer; scores lie between 0 and 1.",
    ),
)


def expert_plots(records: Sequence[Record]) -> Iterator[Plot | None]:
    """Draw balance over tokens, loads over time, and the newest loads of each layer's experts."""
    drawn = set()
    for balance in _BALANCES:
        yield _balance(records, balance)
        drawn |= {f"moe/{balance.key}", f"moe/{balance.key}{balance.worst}"}
    for key in dict.fromkeys(key for record in records for key in record.curves.keys("moe/")):
        if key not in drawn and not (key in _EXPECTED_ZERO and _always_zero(records, key)):
            yield _other(records, key)
    for i, record in enumerate(records[:_HEAT_RUNS]):
        yield from _load_maps(record, i if len(records) > 1 else None)


def _always_zero(records: Sequence[Record], key: str) -> bool:
    return not any(np.nan_to_num(record.curves.column(key)).any() for record in records)


def _balance(records: Sequence[Record], balance: _Balance) -> Plot | None:
    """Draw a single run's layers, their mean, and the worst; of several runs the mean, and dotted the worst."""
    chart = empty_chart(records, balance.title, balance.unit)
    several = len(records) > 1
    dots = (0, (1, 1.2)) if several and balance.worst else None
    shown = []
    for i, record in runs_with(records, f"moe/{balance.key}{balance.worst}"):
        tokens = record.curves.tokens
        if not several and (layers := record.curves.arrays(f"moe/layer_{balance.key}", 1)) is not None:
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
    if (limits := focus(shown)) is None:
        return None
    chart.axes.set_ylim(*limits)
    key = " Dots: the worst layer." if dots else " Faint: each layer." if not several else ""
    return Plot(f"moe_{balance.key}", balance.caption + key, chart)


def _other(records: Sequence[Record], key: str) -> Plot:
    words = key.removeprefix("moe/").replace("_", " ").replace("/", ", ")
    chart = empty_chart(records, f"Experts: {words}", words)
    for i, record in runs_with(records, key):
        tokens, values = record.curves.tokens, record.curves.column(key)
        if np.array_equal(values, np.round(values), equal_nan=True):  # counts are not smoothed
            chart.line(record.name, tokens, values, i)
        else:
            curve(chart, records, i, tokens, values)
    return Plot(key.replace("/", "_"), "", chart)


def _load_maps(record: Record, number: int | None) -> Iterator[Plot]:
    """Draw loads as multiples of an equal share: 1 is balanced, 0 is a dead expert."""
    if (found := record.curves.arrays("moe/load", 2)) is None:
        return
    indices, load_SLE = found
    means = load_SLE.mean(axis=2, keepdims=True)
    relative_SLE = np.divide(load_SLE, means, out=np.zeros_like(load_SLE), where=means > 0)
    first_layer = _first_layer(record)
    ending, named = ("", "") if number is None else (f"_{number}", f", {record.name}")
    of_zero = "".join(f" {_zero_in_words(record, key)}" for key in _EXPECTED_ZERO if record.curves.keys(key))
    chart = _map_over_time(f"Expert load over time{named}", record.curves.tokens[indices], relative_SLE, first_layer)
    caption = "Each layer's experts, the busiest on top, in multiples of an equal share: 1 is balanced." + of_zero
    yield Plot(f"moe_load_over_time{ending}", caption, chart)
    chart = _map_of_a_step(f"Expert load{named}", relative_SLE[-1], first_layer)
    step = int(record.curves.steps[indices[-1]])
    caption = f"Tokens of step {step:,}, in multiples of an equal share: 1 is balanced, 0 is a dead expert."
    yield Plot(f"moe_load{ending}", caption, chart)


def _zero_in_words(record: Record, key: str) -> str:
    what = key.removeprefix("moe/").replace("_", " ")
    return f"{what.capitalize()}: {'none in any step.' if _always_zero([record], key) else 'see the plot.'}"


def _first_layer(record: Record) -> int:
    """Return the number of the first layer with experts in the order of execution; layer 0 is the first."""
    model = record.recipe.get("model") or {}
    return int(model.get("first_k_dense", 0)) * int(model.get("layer_sharing", 1))


def _by_moment(tokens_S: Floats, values_S: Floats) -> tuple[Floats, Floats]:
    """Divide the run into equal parts; return their ends in tokens and the mean of each part's values.

    A part without values takes those of the next step, whose batch it lies in.
    """
    edges = np.linspace(0, tokens_S[-1], _MOMENTS + 1)
    bounds = np.searchsorted(tokens_S, edges, side="right")
    means = [values_S[start : max(stop, start + 1)].mean(axis=0) for start, stop in itertools.pairwise(bounds)]
    return edges[1:], np.stack(means)


def _map_over_time(title: str, tokens_S: Floats, relative_SLE: Floats, first_layer: int) -> Chart:
    """Draw experts by moments of the run, layer under layer.

    In each layer the busiest expert is on top: unsorted rows of two pixels would look like noise.
    """
    _, num_layers, num_experts = relative_SLE.shape
    rows = num_layers * num_experts
    chart = Chart(title, "training tokens", "layer", height=_height(rows * _EXPERT_ROW))
    ends, relative_MLE = _by_moment(tokens_S, relative_SLE)
    order_1LE = relative_MLE.mean(axis=0, keepdims=True).argsort(axis=2)[:, :, ::-1]
    relative_MLE = np.take_along_axis(relative_MLE, order_1LE, axis=2)
    _draw_map(chart, relative_MLE.reshape(len(ends), rows).T, (0, float(ends[-1]), rows, 0))
    for layer in range(1, num_layers):
        chart.axes.axhline(layer * num_experts, color=MUTED[0], linewidth=0.5)
    chart.quantities("x")
    _number(chart.axes.yaxis, num_layers, chart.height, first=first_layer, size=num_experts)
    return chart


def _map_of_a_step(title: str, relative_LE: Floats, first_layer: int) -> Chart:
    num_layers, num_experts = relative_LE.shape
    chart = Chart(title, "expert", "layer", height=_height(num_layers * _LAYER_ROW))
    _draw_map(chart, relative_LE, (0, num_experts, num_layers, 0))
    _number(chart.axes.xaxis, num_experts, chart.width)
    _number(chart.axes.yaxis, num_layers, chart.height, first=first_layer)
    return chart


def _height(wanted: float) -> float:
    return min(max(wanted, PLOT_HEIGHT), _TALLEST)


def _draw_map(chart: Chart, relative: Floats, extent: tuple[float, float, float, float]) -> None:
    colors = LinearSegmentedColormap.from_list("load", _HEAT_COLORS)
    image = chart.axes.imshow(relative, cmap=colors, vmin=0, vmax=2, aspect="auto", interpolation="none", extent=extent)
    chart.axes.grid(False)
    chart.color_bar(image)


def _number(ticks: Ticks, count: int, inches: float, *, first: int = 0, size: int = 1) -> None:
    """Number `count` cells of this size in their middle, starting at `first`; only every n-th if there is no room."""
    every = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, count) if count * _TICK <= inches * n)
    ticks.set_major_locator(FixedLocator([(i + 0.5) * size for i in range(0, count, every)]))
    ticks.set_major_formatter(lambda place, _: f"{first + math.floor(place / size)}")
