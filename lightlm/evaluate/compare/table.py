"""The table of scores as data. The CLI renders it with rich, the report as HTML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightlm.evaluate.compare.baselines import Baseline, Legend
from lightlm.evaluate.compare.comparison import NOISE, Answers, Comparison, sentences
from lightlm.evaluate.results.rows import Row

TEXT_COLUMNS = 2  # task and metric; the others hold numbers


@dataclass(frozen=True)
class Score:
    """One metric of one task, measured on a model.

    Args:
        step: the checkpoint's step; None if it is not shown or unknown.
        limit: the number of documents that the task was limited to; None for all.
    """

    step: int | None
    limit: int | None
    answers: Answers

    @property
    def row(self) -> Row:
        """The value, its standard error and its number of documents."""
        return self.answers.row

    def __str__(self) -> str:
        error = "" if self.row.stderr is None else f" ± {self.row.stderr:.4f}"
        return f"{self.row.value:.4f}{error}{'' if self.step is None else f' (step {self.step:,})'}"


@dataclass(frozen=True)
class Line:
    """One metric of one task on the same documents. Args: scores: by the model's number, if it has one."""

    task: str
    metric: str
    documents: str
    scores: dict[int, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of models and published figures.

    Args:
        columns: task, metric and documents, then one per model and baseline.
        rows: texts by column.
        best: (row, column) of figures that are better beyond noise.
        sentences: the comparisons in words.
        notes: what noise means, and the legend of published figures.
    """

    columns: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    sentences: list[str]
    notes: list[str]


def count_documents(score: Score) -> str:
    """Return the number of documents as text; empty for a group of tasks."""
    return "" if score.row.documents is None else f"{score.row.documents:,}"


def score_lines(models: Sequence[Sequence[Score]], describe: Callable[[Score], str] = count_documents) -> list[Line]:
    """Return a line per task, metric and description of its documents; of equal scores of a model the last counts."""
    lines: dict[tuple[str, str, str], Line] = {}
    for number, scores in enumerate(models):
        for score in scores:
            key = (score.row.task, score.row.metric, describe(score))
            lines.setdefault(key, Line(*key)).scores[number] = score
    return list(lines.values())


def score_table(
    lines: Sequence[Line],
    models: Sequence[str],
    comparisons: Sequence[Comparison] = (),
    baselines: Sequence[Baseline] = (),
) -> ScoreTable:
    """Build the table. With two models, a figure that is better beyond noise is marked as best."""
    figures = list(models) if len(models) > 1 else ["Value ± Stderr"]
    winners = {(one.task, one.metric): one.winner for one in comparisons} if len(models) == 2 else {}
    legend = Legend()
    rows: list[list[str]] = []
    best = set()
    for line in lines:
        winner = winners.get((line.task, line.metric))
        if winner is not None and len(line.scores) == 2:
            best.add((len(rows), TEXT_COLUMNS + 1 + winner))
        score = next(iter(line.scores.values()))
        shots = score.answers.protocol.num_fewshot
        published = [baseline.find(line.task, line.metric) for baseline in baselines]
        cells = [str(line.scores.get(number, "")) for number in range(len(models))]
        cells += [legend.cell(found[0], shots, score.limit) if found else "–" for found in published]
        rows.append([line.task, line.metric, line.documents, *cells])
    columns = ["Task", "Metric", "Documents", *figures, *(baseline.name for baseline in baselines)]
    notes = [NOISE] if any(comparison.difference for comparison in comparisons) else []
    return ScoreTable(columns, rows, best, sentences(comparisons), notes + legend.lines(baselines))
