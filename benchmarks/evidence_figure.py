"""The results of learning.py as a figure: loss over tokens, FLOPs and time, and the share of tokens a recipe needs."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from evidence import CONFIDENCE, Record, baseline, cost_of, families, finals, last_tokens, paired, reach

HEAD = 0.15  # of the baseline's tokens, its initial fall, that does not set the limits of the loss axis

Scale = Callable[[str], float]  # what a token of a contestant takes


def draw(record: Record, path: Path) -> list[Path]:
    """Draw the loss over tokens as `path`, over FLOPs and over time as two files beside it; return all three."""
    from lightlm.report.charts.chart import compute_unit

    first, entries = baseline(record, "val_loss"), record["contestants"]
    names = [first, *(name for members in ends(record).values() for name in members)]
    most = max(cost_of(record, name, "flops") * last_tokens(entries[name]) for name in names)
    size, unit = compute_unit(most)
    axes: dict[str, tuple[str, str, Scale]] = {
        "": ("tokens", "training tokens", lambda name: 1.0),
        "-flops": (
            "FLOPs",
            f"training {unit}, the optimizer's included",
            lambda name: cost_of(record, name, "flops") / size,
        ),
        "-time": ("time", "training time (min)", lambda name: cost_of(record, name, "seconds") / 60),
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


def ends(record: Record) -> dict[str, list[str]]:
    """Return the contestants of each family that were trained with the most seeds, shortest first."""
    pairs = paired(record, "val_loss")
    most = {family: max(len(pairs[name]) for name in members) for family, members in families(record).items()}
    return {
        family: [name for name in members if len(pairs[name]) == most[family] > 0]
        for family, members in families(record).items()
    }


def _chart(record: Record, title: str, x_label: str, scale: Scale) -> Any:
    """Return a chart of the ends of trainings, joined within a family, over the courses that lead to them.

    An end has the 95% interval of its mean; a course is the mean over seeds, with the range of the seeds as a band.
    """
    from scipy import stats

    from lightlm.report.charts.chart import Chart

    first, entries = baseline(record, "val_loss"), record["contestants"]
    short = first.partition(",")[0]  # without its settings
    groups = {f"{short}, tuned": [first]} | {f"LightLM, {family}": names for family, names in ends(record).items()}
    chart = Chart(title, x_label, "nats per token", name_all=True)
    tokens, loss = record["curve"].index("tokens"), record["curve"].index("val_loss")
    highest, lowest, widest = -math.inf, math.inf, 0.0
    head = HEAD * last_tokens(entries[first])
    for color, (group, members) in enumerate(groups.items()):
        at, means, margins = [], [], []
        for name in members:
            if not math.isfinite(scale(name)):  # its time is another machine's
                continue
            runs = [curve for curve in entries[name]["runs"].values() if curve]
            length = min(map(len, runs))
            curves_SPC = np.array([curve[:length] for curve in runs])
            x_P = curves_SPC[0, :, tokens] * scale(name)
            y_SP = curves_SPC[:, :, loss]
            chart.faint(x_P, y_SP.mean(0), color)
            chart.band(x_P, y_SP.min(0), y_SP.max(0), color)
            at.append(x_P[-1])
            means.append(y_SP.mean(0)[-1])
            few = len(runs) < 2
            margins.append(
                math.nan if few else stats.sem(y_SP[:, -1]) * stats.t.ppf((1 + CONFIDENCE) / 2, len(runs) - 1)
            )
            shown = y_SP[:, curves_SPC[0, :, tokens] >= head]
            highest, lowest = max(highest, shown.max()), min(lowest, shown.min())
            widest = max(widest, x_P[-1])
        if at:
            chart.errors(np.array(at), np.array(means), np.array(margins), color)
            chart.points(f"{group}: ends of trainings", np.array(at), np.array(means), color)
    target = statistics.fmean(finals(record, "val_loss")[first].values())
    chart.levels(f"final loss of {short}", np.array([widest / 2]), np.array([target]), widest)
    margin = 0.06 * (highest - lowest)
    chart.axes.set_ylim(lowest - 2 * margin, highest + margin)  # below is room for the shares
    chart.axes.set_xlim(0, 1.03 * widest)
    return chart


def _mark_shares(chart: Any, record: Record) -> None:
    """Mark where the line between a family's ends has the baseline's final loss."""
    from lightlm.report.charts.chart import run_color

    first = baseline(record, "val_loss")
    target = statistics.fmean(finals(record, "val_loss")[first].values())
    above = True
    for color, family in enumerate(families(record), start=1):
        found = reach(record, family)
        if not found.bound:
            x = found.share * last_tokens(record["contestants"][first])
            chart.axes.plot([x], [target], marker="D", markersize=7, color=run_color(color), zorder=5)
            style: dict[str, Any] = {
                "textcoords": "offset points",
                "ha": "left" if above else "right",
                "weight": "bold",
            }
            place = (6, 8) if above else (-6, -16)  # away from the lines, which come from above and go on below
            chart.axes.annotate(f"{found.share:.1%}", (x, target), xytext=place, color=run_color(color), **style)
            above = False
