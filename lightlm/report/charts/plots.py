"""The plots of a report. Each is drawn if its metrics exist; each run has its own color."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from lightlm.evaluate.compare.baselines import Baseline
from lightlm.report.charts.bars import score_bars
from lightlm.report.charts.chart import compute_unit
from lightlm.report.charts.drawing import TOKENS, Axis, Plot, curve, empty_chart, highest, label
from lightlm.report.charts.experts import expert_plots
from lightlm.report.curves import Curves, Floats, focus
from lightlm.report.record import Record

_GIB = 2.0**30
_TIMES = ((3 * 3600.0, 3600.0, "h"), (180.0, 60.0, "min"))  # from this many seconds on, divide by this, for this unit
_GROUP_STYLES = (None, (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # dashes of parameter groups


def draw_plots(records: Sequence[Record], baselines: Sequence[Baseline] = ()) -> list[Plot]:
    """Draw every plot that these runs have metrics for; `baselines` adds published scores beside theirs."""
    found = [plot for plot in _all_plots(records, baselines) if plot.chart.axes.has_data()]
    for plot in found:
        plot.chart.finish()
    return found


def _all_plots(records: Sequence[Record], baselines: Sequence[Baseline]) -> Iterator[Plot]:
    time = _time_axis(records)
    zoom = "The first tenth of each run, its steep fall, does not set the limits."
    yield _loss(records, "loss", "Loss", TOKENS, f"Moving average over the raw losses. {zoom}")
    yield _loss(records, "loss_over_time", "Loss over time", time, "The same losses over the time of training steps.")
    if (compute := _compute_axis(records)) is not None:
        yield _loss(records, "loss_over_compute", "Loss over compute", compute, f"By active parameters. {zoom}")
    yield _loss(records, "loss_log", "Loss, the whole run", TOKENS, "Logarithmic in tokens.", whole=True)
    yield _marks(records, "val_bpb", "Validation, bits per byte", "bits per byte", "Comparable across tokenizers.")
    yield _validation_by_source(records)
    yield _learning_rates(records)
    yield _scheduled(records, "weight_decay", "Weight decay", "share per unit of learning rate")
    yield _scheduled(records, "momentum", "Momentum", "momentum of the matrices")
    yield _gradient_norm(records)
    speed = "Training steps only, without validation and saving."
    yield _measured(records, "throughput", "Throughput", "tokens per second", _column("tokens_per_second"), speed)
    yield _measured(records, "data_wait", "Waiting for data", "share of the step", _data_wait)
    yield _measured(records, "mfu", "Model FLOPs utilization", "share of the peak", _column("mfu"))
    yield _measured(records, "memory", "Memory", "GiB", lambda curves: curves.column("memory") / _GIB)
    yield from _evaluations(records)
    yield from score_bars(records, baselines)
    yield from expert_plots(records)


def _time_axis(records: Sequence[Record]) -> Axis:
    """Return an axis in seconds, minutes or hours, as the longest run needs."""
    longest = highest([record.curves.seconds for record in records])
    size, unit = next(((size, unit) for start, size, unit in _TIMES if longest >= start), (1.0, "s"))
    return Axis(f"training time ({unit})", lambda record: record.curves.seconds / size)


def _compute_axis(records: Sequence[Record]) -> Axis | None:
    """Return an axis of training FLOPs; None if all runs have the same cost per token."""
    if len({cost for record in records if (cost := record.parameters.get("flops_per_token"))}) < 2:
        return None

    def flops(record: Record) -> Floats:
        return record.curves.tokens * record.parameters.get("flops_per_token", np.nan)

    most = highest([flops(record) for record in records])
    size, unit = compute_unit(most)
    return Axis(f"training {unit}", lambda record: flops(record) / size)


def _loss(records: Sequence[Record], name: str, title: str, axis: Axis, caption: str, *, whole: bool = False) -> Plot:
    chart = empty_chart(records, title, "nats per token", axis)
    shown: list[Floats] = []
    for i, record in enumerate(records):
        x = axis.of(record)
        shown += curve(chart, records, i, x, record.curves.column("loss"), "training, smoothed")
        validation = record.curves.column("val_loss")
        chart.points(label(records, record, "validation"), x, validation, i, joined=len(records) == 1)
        shown.append(validation)
    if whole:
        chart.axes.set_xlim(auto=True)
        chart.axes.set_xscale("log")
        chart.quantities("x")
    elif limits := focus(shown):
        chart.axes.set_ylim(*limits)
    if len(records) > 1 and any(record.curves.last("val_loss") for record in records):
        caption += " Circles: validation."
    return Plot(name, caption, chart)


def _marks(records: Sequence[Record], key: str, title: str, unit: str, caption: str) -> Plot:
    """Plot a metric that only some steps have."""
    chart = empty_chart(records, title, unit)
    for i, record in enumerate(records):
        chart.points(record.name, record.curves.tokens, record.curves.column(key), i)
    return Plot(key.replace("/", "_"), caption, chart)


def _validation_by_source(records: Sequence[Record]) -> Plot:
    """Plot the validation losses of the folders of a mixture."""
    chart = empty_chart(records, "Validation by source", "nats per token")
    for i, record in enumerate(records):
        for number, key in enumerate(record.curves.keys("val_loss/")):
            source = key.removeprefix("val_loss/")
            name = source if len(records) == 1 else f"{record.name}: {source}"
            chart.points(name, record.curves.tokens, record.curves.column(key), number if len(records) == 1 else i)
    return Plot("val_loss_by_source", "The folders of a mixture.", chart)


def _learning_rates(records: Sequence[Record]) -> Plot:
    chart = empty_chart(records, "Learning rate", "learning rate")
    rates = []
    for i, record in enumerate(records):
        groups = [key for key in record.curves.keys("lr") if key == "lr" or key.startswith("lr_")]
        for number, key in enumerate(groups):
            rates.append(record.curves.column(key))
            group = key.removeprefix("lr_").replace("_", " ")
            name = group if len(records) == 1 else record.name if key == "lr" else f"{record.name}: {group}"
            # Groups of a single run have their own colors; with several runs they share the run's color.
            color, style = (number, None) if len(records) == 1 else (i, _GROUP_STYLES[number % len(_GROUP_STYLES)])
            chart.line(name, record.curves.tokens, rates[-1], color, style=style)
    peaks = [peak for rate in rates if (peak := highest([rate])) > 0] or [1.0]
    if max(peaks) > 10 * min(peaks):  # such as Muon's and AdamW's: on a linear axis the smaller is a flat line
        chart.axes.set_ylim(min(peaks) / 100, max(peaks) * 2)  # a decay to zero has no lower end on this axis
        chart.log_y()
    else:
        chart.axes.set_ylim(0, max(peaks) * 1.15)
    return Plot("learning_rate", "Rates at the middle of each batch, by parameter group where they differ.", chart)


def _scheduled(records: Sequence[Record], key: str, title: str, unit: str) -> Plot:
    """Plot a metric that only runs with a schedule of it have, as it is."""
    chart = empty_chart(records, title, unit)
    for i, record in enumerate(records):
        chart.line(record.name, record.curves.tokens, record.curves.column(key), i)
    return Plot(key, "At the middle of each batch.", chart)


def _gradient_norm(records: Sequence[Record]) -> Plot:
    chart = empty_chart(records, "Gradient norm", "global norm before clipping")
    marked = False
    for i, record in enumerate(records):
        norms, tokens = record.curves.column("grad_norm"), record.curves.tokens
        norms[norms <= 0] = np.nan  # the axis is logarithmic
        curve(chart, records, i, tokens, norms)
        spikes = record.curves.flagged("spike")
        chart.points("spike", tokens[spikes], norms[spikes], i, joined=False, mark="X")
        marked = marked or bool(spikes.any())
    chart.log_y()
    return Plot("grad_norm", "Logarithmic." + (" Crosses: steps flagged as spikes." if marked else ""), chart)


def _column(key: str) -> Callable[[Curves], Floats]:
    return lambda curves: curves.column(key)


def _data_wait(curves: Curves) -> Floats:
    seconds = curves.column("step_seconds")
    seconds[seconds == 0] = np.nan
    return curves.column("data_seconds") / seconds


def _measured(
    records: Sequence[Record], name: str, title: str, unit: str, values: Callable[[Curves], Floats], caption: str = ""
) -> Plot:
    """Plot a metric of every step from zero up; all but memory, which only grows, is smoothed."""
    chart = empty_chart(records, title, unit)
    columns = [values(record.curves) for record in records]
    for i, (record, column) in enumerate(zip(records, columns, strict=True)):
        if unit == "GiB":
            chart.line(record.name, record.curves.tokens, column, i)
        else:
            curve(chart, records, i, record.curves.tokens, column)
    chart.axes.set_ylim(0, max(highest(columns, 99.5), 0.02) * 1.15)
    chart.quantities("y")
    if unit.startswith("share"):
        chart.axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return Plot(name, caption, chart)


def _evaluations(records: Sequence[Record]) -> Iterator[Plot]:
    """Plot lm-eval's tasks during training: `eval/<task>/<metric>`."""
    keys = dict.fromkeys(key for record in records for key in record.curves.keys("eval/"))
    for key in keys:
        if not key.endswith("_stderr"):
            task, _, metric = key.removeprefix("eval/").rpartition("/")
            yield _marks(records, key, f"{task}: {metric}" if task else metric, metric, "Measured during training.")
