"""The table of scores as data. The CLI renders it with rich, the report as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightlm.evaluate.compare.baselines import Baseline, Legend
from lightlm.evaluate.compare.comparison import NOISE, Answers, Comparison, Protocol, sentences
from lightlm.evaluate.results.rows import Row

TEXT_COLUMNS = 2  # task and metric; the others hold numbers
_ABSENT = "–"


@dataclass(frozen=True)
class Cell:
    """One model's figure. Args: limit: the task's documents if cut; note: text behind the figure, such as a step."""

    row: Row
    protocol: Protocol
    limit: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """The models' figures for one task and metric, None for a model without one."""

    task: str
    metric: str
    documents: str
    cells: Sequence[Cell | None]


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
    rows: list[list[str]] = field(default_factory=list)
    best: set[tuple[int, int]] = field(default_factory=set)
    sentences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def score_table(
    lines: Sequence[Line],
    models: Sequence[str],
    comparisons: Sequence[Comparison] = (),
    baselines: Sequence[Baseline] = (),
) -> ScoreTable:
    """Build the table. With two models, a figure that is better beyond noise is marked as best."""
    figures = list(models) if len(models) > 1 else ["Value ± Stderr"]
    table = ScoreTable(["Task", "Metric", "Documents", *figures, *(baseline.name for baseline in baselines)])
    winners = {(one.task, one.metric): one.winner for one in comparisons} if len(models) == 2 else {}
    legend = Legend()
    for line in lines:
        shown = [_figure(cell) for cell in line.cells]
        winner = winners.get((line.task, line.metric))
        if winner is not None and all(line.cells):
            table.best.add((len(table.rows), TEXT_COLUMNS + 1 + winner))
        cell = next(cell for cell in line.cells if cell)
        published = [_published(baseline, line, cell, legend) for baseline in baselines]
        table.rows.append([line.task, line.metric, line.documents, *shown, *published])
    table.sentences.extend(sentences(comparisons))
    table.notes.extend([NOISE] if any(comparison.difference for comparison in comparisons) else [])
    table.notes.extend(legend.lines(baselines))
    return table


def lines_of(answers: Sequence[Sequence[Answers]], limit: int | None) -> list[Line]:
    """Return a line per task and metric from each model's answers."""
    found: dict[tuple[str, str], list[Cell | None]] = {}
    for column, model in enumerate(answers):
        for one in model:
            cells = found.setdefault((one.row.task, one.row.metric), [None] * len(answers))
            cells[column] = Cell(one.row, one.protocol, limit)
    counts = {key: next(cell.row.documents for cell in cells if cell) for key, cells in found.items()}
    return [Line(*key, "" if counts[key] is None else f"{counts[key]:,}", cells) for key, cells in found.items()]


def _figure(cell: Cell | None) -> str:
    if cell is None:
        return ""
    error = "" if cell.row.stderr is None else f" ± {cell.row.stderr:.4f}"
    return f"{cell.row.value:.4f}{error}{cell.note and f' {cell.note}'}"


def _published(baseline: Baseline, line: Line, cell: Cell, legend: Legend) -> str:
    figures = baseline.find(line.task, line.metric)
    return legend.cell(figures[0], cell.protocol.num_fewshot, cell.limit) if figures else _ABSENT
