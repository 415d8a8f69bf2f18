"""The results of learning.py as a figure: loss over tokens, FLOPs and time, and the share of tokens a recipe needs."""

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from evidence import Record, baseline, cost_of, families, finals, last_tokens, reach

HEAD = 0.1  # of the baseline's tokens, its initial fall, that does not set the limits of the loss axis


def draw(record: Record, path: Path) -> list[Path]:
    """Draw the loss over tokens as `path`, over FLOPs and over time as two files beside it; return all three."""
    from lightlm.report.charts.chart import compute_unit

    first, entries = baseline(record, "val_loss"), record["contestants"]
    names = [first, *(name for members in families(record).values() for name in members)]
    most = max(cost_of(entries[name], "flops") * last_tokens(entries[name]) for name in names if entries[name]["runs"])
    size, unit = compute_unit(most)
    axes = {
        "": ("tokens", "training tokens", lambda entry: 1.0),
        "-flops": ("FLOPs", f"training {unit}", lambda entry: cost_of(entry, "flops") / size),
        "-time": ("time", "training time (min)", lambda entry: cost_of(entry, "seconds") / 60),
    }
    paths = []
    for suffix, (title, label, scale) in axes.items():
        chart = _chart(record, f"Validation loss over {title}", label, scale)
        if not suffix:
            _mark_shares(chart, record)
            chart.quantities("x")
        paths.append(path.with_name(f"{path.stem}{suffix}{path.suffix}"))
        paths[-1].write_bytes(chart.finish().png())
    return paths


def _chart(record: Record, title: str, x_label: str, scale: Any) -> Any:
    """Return a chart of the baseline and the families: means with the range of the seeds, and the ends of trainings."""
    from lightlm.report.charts.chart import Chart

    first, entries = baseline(record, "val_loss"), record["contestants"]
    short = first.partition(",")[0]  # without its settings
    groups = {f"{short}, tuned": [first]}
    groups |= {f"LightLM, {family}": members for family, members in families(record).items()}
    chart = Chart(title, x_label, "nats per token", name_all=True)
    tokens, loss = record["curve"].index("tokens"), record["curve"].index("val_loss")
    highest, lowest, widest = -math.inf, math.inf, 0.0
    head = HEAD * last_tokens(entries[first])
    for color, (group, members) in enumerate(groups.items()):
        for name in members:
            if not (runs := [curve for curve in entries[name]["runs"].values() if curve]):
                continue
            if not math.isfinite(scale(entries[name])):  # its time is another machine's
                continue
            length = min(map(len, runs))
            curves_SPC = np.array([curve[:length] for curve in runs])
            x_P = curves_SPC[0, :, tokens] * scale(entries[name])
            y_SP = curves_SPC[:, :, loss]
            chart.line(group, x_P, y_SP.mean(0), color)
            chart.band(x_P, y_SP.min(0), y_SP.max(0), color)
            chart.points("", x_P[-1:], y_SP.mean(0)[-1:], color, joined=False)
            shown = y_SP[:, curves_SPC[0, :, tokens] >= head]
            highest, lowest = max(highest, shown.max()), min(lowest, shown.min())
            widest = max(widest, x_P[-1])
    target = statistics.fmean(finals(record, "val_loss")[first].values())
    chart.levels(f"final loss of {short}", np.array([widest / 2]), np.array([target]), widest)
    margin = 0.06 * (highest - lowest)
    chart.axes.set_ylim(lowest - 2 * margin, highest + margin)  # below is room for the shares
    chart.axes.set_xlim(0, 1.03 * widest)
    return chart


def _mark_shares(chart: Any, record: Record) -> None:
    """Mark where each family has the baseline's final loss."""
    from lightlm.report.charts.chart import run_color

    first = baseline(record, "val_loss")
    target = statistics.fmean(finals(record, "val_loss")[first].values())
    for color, family in enumerate(families(record), start=1):
        found = reach(record, family)
        if not found.bound:
            x = found.share * last_tokens(record["contestants"][first])
            chart.axes.plot([x], [target], marker="D", markersize=7, color=run_color(color), zorder=5)
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "weight": "bold"}
            text = f"{found.share:.0%}"  # below the line and left: the curves come from above and end to the right
            chart.axes.annotate(text, (x, target), xytext=(-4, -18), color=run_color(color), **style)
