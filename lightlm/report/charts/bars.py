"""Accuracies as bars with error bars, beside chance and published figures."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from lightlm.evaluate.compare.baselines import Baseline
from lightlm.evaluate.compare.chance import Chance, chance_of
from lightlm.report.charts.chart import Chart
from lightlm.report.charts.curves import Floats
from lightlm.report.charts.drawing import Plot
from lightlm.report.record import Record
from lightlm.report.scores import Line, Scores

# Of a task the first that it has is drawn; mutual information is what heldout_cloze tells small models apart by.
_METRICS = ("acc_mutual_info", "acc_norm", "acc", "exact_match")
_IN_A_CHART = 6  # tasks, whose names stand below their bars
_GROUP = 0.84  # of a task's place that is drawn in
_BARS = 0.74  # of that for the bars, where published figures stand to the right of them
_NAME = 11  # characters of a task's name that fit in a line
_FONT = 9.0
_NORMAL_95 = 1.96


def score_bars(records: Sequence[Record], baselines: Sequence[Baseline]) -> Iterator[Plot]:
    """One figure for each few tasks, and none without accuracies."""
    lines = _drawn(Scores(records).widest(range(len(records))))
    charts = math.ceil(len(lines) / _IN_A_CHART)
    for number in range(charts):
        chunk = lines[number * len(lines) // charts : (number + 1) * len(lines) // charts]
        title, name = ("Scores", "scores") if not number else (f"Scores ({number + 1})", f"scores_{number + 1}")
        yield Plot(name, _caption(chunk, baselines), _chart(title, records, chunk, baselines))


def _drawn(lines: Sequence[Line]) -> list[Line]:
    by_task: dict[str, Line] = {}
    for metric in _METRICS:
        for line in lines:
            if line.metric == metric:
                by_task.setdefault(line.task, line)
    tasks = dict.fromkeys(line.task for line in lines)
    return [by_task[task] for task in tasks if task in by_task]


def _chart(title: str, records: Sequence[Record], lines: Sequence[Line], baselines: Sequence[Baseline]) -> Chart:
    """A group of bars for each task, which has place 0, 1, ..."""
    chart = Chart(title, "", "share of documents right", name_all=True)
    runs = [i for i in range(len(records)) if any(i in line.scores for line in lines)]
    width = _GROUP * (_BARS if baselines else 1.0) / len(runs)
    for position, i in enumerate(runs):
        having = [(place, line.scores[i].row) for place, line in enumerate(lines) if i in line.scores]
        x = np.array([place + (position + 0.5) * width - _GROUP / 2 for place, _ in having])
        heights = np.array([row.value for _, row in having])
        errors = np.array([np.nan if row.stderr is None else _NORMAL_95 * row.stderr for _, row in having])
        chart.bars(records[i].name, x, heights, errors, i, width)
    levels = [(place, chance.value) for place, line in enumerate(lines) if (chance := chance_of(line.task))]
    if levels:
        chart.levels("chance", *_columns(levels), _GROUP + 0.04)
    for number, baseline in enumerate(baselines):
        offset = _GROUP * (_BARS - 0.5 + (1 - _BARS) * (number + 0.8) / (len(baselines) + 0.3))
        points = [(i + offset, share) for i, line in enumerate(lines) for share in _published(baseline, line)]
        if points:
            chart.shapes(f"{baseline.name}, published*", *_columns(points), number)
    chart.axes.set_xlim(-0.5, max(len(lines), 3) - 0.5)
    chart.axes.set_xticks(range(len(lines)), [_label(line) for line in lines], fontsize=_FONT)
    chart.axes.grid(False, axis="x")
    chart.axes.set_ylim(0, chart.axes.dataLim.y1 * 1.08 or 1.0)
    chart.axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return chart


def _columns(points: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _published(baseline: Baseline, line: Line) -> list[float]:
    return [figure.percent / 100 for figure in baseline.find(line.task, line.metric)[:1]]


def _label(line: Line) -> str:
    """The task, broken at its underscores where it is long, above the metric."""
    name = line.task
    if len(name) > _NAME:
        rows = [""]
        for word in name.split("_"):
            joined = f"{rows[-1]}_{word}" if rows[-1] else word
            rows = [*rows[:-1], joined] if len(joined) <= _NAME or not rows[-1] else [*rows[:-1], f"{rows[-1]}_", word]
        name = "\n".join(rows[:3])
    return f"{name}\n{line.metric}".replace("$", r"\$")


def _caption(lines: Sequence[Line], baselines: Sequence[Baseline]) -> str:
    levels: dict[Chance, list[str]] = {}
    for line in lines:
        if chance := chance_of(line.task):
            levels.setdefault(chance, []).append(line.task)
    text = "Error bars: 95% intervals, 1.96 standard errors."
    if levels:
        reasons = (f"{', '.join(tasks)} {chance.value:.1%}, {chance.reason}" for chance, tasks in levels.items())
        text += f" Dashes, chance: {'; '.join(reasons)}."
    if any(_published(baseline, line) for baseline in baselines for line in lines):
        text += " * Under protocols that are not the runs', or not wholly stated: see the table of scores."
    return text
