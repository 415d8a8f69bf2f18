"""Accuracies as bars with error bars, beside chance level and published scores."""

import math
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from lightlm.evaluate.compare.baselines import Baseline
from lightlm.evaluate.compare.chance import Chance, chance_of
from lightlm.evaluate.compare.table import Line
from lightlm.report.charts.chart import Chart
from lightlm.report.charts.drawing import Plot
from lightlm.report.record import Record
from lightlm.report.scores import score_lines, widest

# The first of these that a task has is drawn; heldout_cloze tells small models apart by mutual information.
_METRICS = ("acc_mutual_info", "acc_tokens", "acc_ties", "acc_norm", "acc", "exact_match")
_IN_A_CHART = 6  # tasks, whose names fit below their bars
_GROUP = 0.84  # width of a task's bars and marks; neighboring tasks are 1 apart
_BARS = 0.74  # share of that width for the bars if published scores stand to their right
_NAME = 12  # characters of a task's name in one line
_FONT = 9.0
_NORMAL_95 = 1.96


def score_bars(records: Sequence[Record], baselines: Sequence[Baseline]) -> Iterator[Plot]:
    """Draw one plot for every few tasks that have accuracies."""
    found = {(line.task, line.metric): line for line in widest(score_lines(records), range(len(records)))}
    metrics = {task: [metric for metric in _METRICS if (task, metric) in found] for task, _ in found}
    lines = [found[task, having[0]] for task, having in metrics.items() if having]
    charts = math.ceil(len(lines) / _IN_A_CHART)
    for number in range(charts):
        chunk = lines[number * len(lines) // charts : (number + 1) * len(lines) // charts]
        title, name = ("Scores", "scores") if not number else (f"Scores ({number + 1})", f"scores_{number + 1}")
        yield Plot(name, _caption(chunk, baselines), _chart(title, records, chunk, baselines))


def _chart(title: str, records: Sequence[Record], lines: Sequence[Line], baselines: Sequence[Baseline]) -> Chart:
    """Draw a group of bars per task; the groups are centered at 0, 1, ..."""
    chart = Chart(title, "", "share of documents right", name_all=True)
    runs = [i for i in range(len(records)) if any(i in line.scores for line in lines)]
    width = _GROUP * (_BARS if baselines else 1.0) / len(runs)
    for position, i in enumerate(runs):
        having = [(place, line.scores[i].row) for place, line in enumerate(lines) if i in line.scores]
        x = np.array([place + (position + 0.5) * width - _GROUP / 2 for place, _ in having])
        heights = np.array([row.value for _, row in having])
        errors = np.array([np.nan if row.stderr is None else _NORMAL_95 * row.stderr for _, row in having])
        chart.bars(records[i].name, x, heights, errors, i, width)
    if levels := [(place, chance.value) for place, line in enumerate(lines) if (chance := chance_of(line.task))]:
        x, y = np.array(levels).T
        chart.levels("chance", x, y, _GROUP + 0.04)
    for number, baseline in enumerate(baselines):
        offset = _GROUP * (_BARS - 0.5 + (1 - _BARS) * (number + 0.8) / (len(baselines) + 0.3))
        figures = [(i, baseline.find(line.task, line.metric)) for i, line in enumerate(lines)]
        if points := [(i + offset, found[0].value) for i, found in figures if found]:
            x, y = np.array(points).T
            chart.shapes(f"{baseline.name}, published*", x, y, number)
    chart.axes.set_xlim(-0.5, max(len(lines), 3) - 0.5)
    chart.axes.set_xticks(range(len(lines)), [_label(line) for line in lines], fontsize=_FONT)
    chart.axes.grid(False, axis="x")
    chart.axes.set_ylim(0, chart.axes.dataLim.y1 * 1.08 or 1.0)
    chart.axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return chart


def _label(line: Line) -> str:
    """Return the task's name, broken at underscores if it is long, above the metric."""
    name = line.task if len(line.task) < _NAME else line.task.replace("_", "_ ")
    rows = textwrap.wrap(name, _NAME)[:3]
    return "\n".join([*(row.replace(" ", "") for row in rows), line.metric]).replace("$", r"\$")


def _caption(lines: Sequence[Line], baselines: Sequence[Baseline]) -> str:
    levels: dict[Chance, list[str]] = {}
    for line in lines:
        if chance := chance_of(line.task):
            levels.setdefault(chance, []).append(line.task)
    text = "Error bars: 95% intervals, 1.96 standard errors."
    if levels:
        reasons = (f"{', '.join(tasks)} {chance.value:.1%}, {chance.reason}" for chance, tasks in levels.items())
        text += f" Dashes, chance: {'; '.join(reasons)}."
    if any(baseline.find(line.task, line.metric) for baseline in baselines for line in lines):
        text += " * Measured under protocols that are not the runs' or are only partly stated: see the table of scores."
    return text
