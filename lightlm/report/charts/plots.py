"""The figures of a report: each is drawn if its metrics are there, every run in a colour of its own."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from lightlm.evaluate.compare.baselines import Baseline
from lightlm.report.charts.bars import score_bars
from lightlm.report.charts.chart import spread
from lightlm.report.charts.curves import Curves, Floats, focus
from lightlm.report.charts.drawing import TOKENS, Axis, Plot, curve, empty_chart, label, runs_with
from lightlm.report.charts.experts import expert_plots
from lightlm.report.record import Record

_GIB = 2.0**30
_FLOPS = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))
_GROUP_STYLES = (None, (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # of parameter groups


def draw_plots(records: Sequence[Record], baselines: Sequence[Baseline] = ()) -> list[Plot]:
    """All figures that these runs have metrics for, ready to be rendered; `baselines` stand beside their scores."""
    found = [plot for plot in _all_plots(records, baselines) if plot is not None]
    return [Plot(plot.name, plot.caption, plot.chart.finish()) for plot in found]


def _all_plots(records: Sequence[Record], baselines: Sequence[Baseline]) -> Iterator[Plot | None]:
    time = _time_axis(records)
    zoom = "The first tenth of each run, its steep fall, does not set the limits."
    yield _loss(records, "loss", "Loss", TOKENS, f"Moving average over the raw losses. {zoom}")
    yield _loss(records, "loss_over_time", "Loss over time", time, "The same against time spent in training steps.")
    if (compute := _compute_axis(records)) is not None:
        yield _loss(records, "loss_over_compute", "Loss over compute", compute, f"By active parameters. {zoom}")
    yield _loss(records, "loss_log", "Loss, the whole run", TOKENS, "Logarithmic in tokens.", whole=True)
    yield _marks(records, "val_bpb", "Validation, bits a byte", "bits a byte", "Comparable across tokenizers.")
    yield _learning_rates(records)
    yield _gradient_norm(records)
    yield _throughput(records)
    yield _share(records, "data_wait", "Waiting for data", "share of the step", _data_wait)
    yield _share(records, "mfu", "Model FLOPs utilisation", "share of the peak", lambda curves: curves.column("mfu"))
    yield _memory(records)
    yield from _evaluations(records)
    yield from score_bars(records, baselines)
    yield from expert_plots(records)


def _time_axis(records: Sequence[Record]) -> Axis:
    """Seconds, minutes or hours, as the longest run asks for."""
    longest = max(float(np.nanmax(record.curves.seconds, initial=0.0)) for record in records)
    unit, size = ("s", 1.0) if longest < 180 else ("min", 60.0) if longest < 3 * 3600 else ("h", 3600.0)
    return Axis(f"training time ({unit})", lambda record: record.curves.seconds / size, False)


def _compute_axis(records: Sequence[Record]) -> Axis | None:
    """Operations of training, where the runs' tokens cost differently much; else it would be the tokens again."""
    if len({cost for record in records if (cost := record.parameters.get("flops_per_token"))}) < 2:
        return None

    def operations(record: Record) -> Floats:
        return record.curves.tokens * record.parameters.get("flops_per_token", np.nan)

    most = max(float(np.nanmax(operations(record), initial=0.0)) for record in records)
    size, unit = next((pair for pair in _FLOPS if most >= pair[0]), (1.0, "FLOPs"))
    return Axis(f"training {unit}", lambda record: operations(record) / size, False)


def _loss(
    records: Sequence[Record], name: str, title: str, axis: Axis, caption: str, *, whole: bool = False
) -> Plot | None:
    chart = empty_chart(records, title, "nats a token", axis)
    shown: list[Floats] = []
    for i, record in runs_with(records, "loss"):
        x = axis.of(record)
        if not np.isfinite(x).any():
            continue
        shown += curve(chart, records, i, x, record.curves.column("loss"), "training, smoothed")
        validation = record.curves.column("val_loss")
        chart.points(label(records, record, "validation"), x, validation, i, joined=len(records) == 1)
        shown.append(validation)
    if not shown:
        return None
    if whole:
        chart.axes.set_xlim(auto=True)
        chart.log_quantities_x()
    elif limits := focus(shown):
        chart.axes.set_ylim(*limits)
    if len(records) > 1 and runs_with(records, "val_loss"):
        caption += " Circles: validation."
    return Plot(name, caption, chart)


def _marks(records: Sequence[Record], key: str, title: str, unit: str, caption: str) -> Plot | None:
    """Something measured now and then."""
    if not (having := runs_with(records, key)):
        return None
    chart = empty_chart(records, title, unit)
    for i, record in having:
        chart.points(record.name, record.curves.tokens, record.curves.column(key), i)
    return Plot(key.replace("/", "_"), caption, chart)


def _learning_rates(records: Sequence[Record]) -> Plot | None:
    chart = empty_chart(records, "Learning rate", "learning rate")
    rates = []
    for i, record in enumerate(records):
        groups = [key for key in record.curves.keys("lr") if key == "lr" or key.startswith("lr_")]
        for number, key in enumerate(groups):
            rates.append(record.curves.column(key))
            group = key.removeprefix("lr_").replace("_", " ") if key != "lr" else "lr"
            label = group if len(records) == 1 else record.name if key == "lr" else f"{record.name}: {group}"
            # Groups of one run share its colour; of a single run they may have colours of their own.
            colour, style = (number, None) if len(records) == 1 else (i, _GROUP_STYLES[number % len(_GROUP_STYLES)])
            chart.line(label, record.curves.tokens, rates[-1], colour, style=style)
    if not rates:
        return None
    peaks = np.array([peak for rate in rates if (peak := float(np.nanmax(rate))) > 0] or [1.0])
    if spread(peaks) > 10:  # Muon's and AdamW's, for example: on one linear axis the smaller would be a flat line
        chart.axes.set_ylim(peaks.min() / 100, peaks.max() * 2)  # a decay to zero would reach down without end
        chart.log_y()
    else:
        chart.from_zero("y", float(peaks.max()))
        chart.scientific_y()
    return Plot("learning_rate", "Of the batch's middle, by parameter group where they differ.", chart)


def _gradient_norm(records: Sequence[Record]) -> Plot | None:
    if not (having := runs_with(records, "grad_norm")):
        return None
    chart = empty_chart(records, "Gradient norm", "global norm before clipping")
    marked = False
    for i, record in having:
        norms, tokens = record.curves.column("grad_norm"), record.curves.tokens
        norms[norms <= 0] = np.nan  # a logarithm has no place for them
        curve(chart, records, i, tokens, norms, "smoothed")
        spikes = record.curves.flagged("spike")
        chart.points("spike", tokens[spikes], norms[spikes], i, joined=False, mark="X")
        marked = marked or bool(spikes.any())
    chart.log_y()
    return Plot("grad_norm", "Logarithmic." + (" Crosses: steps flagged as spikes." if marked else ""), chart)


def _throughput(records: Sequence[Record]) -> Plot | None:
    if not (having := runs_with(records, "tokens_per_second")):
        return None
    chart = empty_chart(records, "Throughput", "tokens a second")
    highest = 0.0
    for i, record in having:
        speeds = record.curves.column("tokens_per_second")
        highest = max(highest, float(np.nanpercentile(speeds, 99.5)))
        curve(chart, records, i, record.curves.tokens, speeds, "smoothed")
    chart.quantities("y")
    chart.from_zero("y", highest)
    return Plot("throughput", "Of training steps; validation and saving do not count.", chart)


def _data_wait(curves: Curves) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Floats = curves.column("data_seconds") / curves.column("step_seconds")
    share[np.isinf(share)] = np.nan
    return share


def _share(
    records: Sequence[Record], name: str, title: str, unit: str, figure: Callable[[Curves], Floats]
) -> Plot | None:
    chart = empty_chart(records, title, unit)
    highest = 0.0
    for i, record in enumerate(records):
        values = figure(record.curves)
        if np.isfinite(values).any():
            highest = max(highest, float(np.nanpercentile(values, 99.5)))
            curve(chart, records, i, record.curves.tokens, values, "smoothed")
    if not chart.axes.lines:
        return None
    chart.from_zero("y", max(highest, 0.02))
    chart.axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return Plot(name, "", chart)


def _memory(records: Sequence[Record]) -> Plot | None:
    if not (having := runs_with(records, "memory")):
        return None
    chart = empty_chart(records, "Memory", "GiB")
    for i, record in having:
        chart.line(record.name, record.curves.tokens, record.curves.column("memory") / _GIB, i)
    chart.from_zero("y", max(float(np.nanmax(record.curves.column("memory"))) for _, record in having) / _GIB)
    return Plot("memory", "", chart)


def _evaluations(records: Sequence[Record]) -> Iterator[Plot | None]:
    """lm-eval's tasks during training: `eval/<task>/<metric>`."""
    keys = dict.fromkeys(key for record in records for key in record.curves.keys("eval/"))
    for key in keys:
        if not key.endswith("_stderr"):
            task, _, metric = key.removeprefix("eval/").rpartition("/")
            yield _marks(records, key, f"{task}: {metric}" if task else metric, metric, "Measured during training.")
