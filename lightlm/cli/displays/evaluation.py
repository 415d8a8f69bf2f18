"""The table that `lightlm eval` prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightlm.cli.console import out

if TYPE_CHECKING:
    from lightlm.evaluate.compare.baselines import Baseline, Legend
    from lightlm.evaluate.compare.comparison import Answers, Comparison

_WIDE = 110  # columns of a terminal from which on figures and their standard errors stand in one line
_IN_A_NARROW_LINE = 3  # figures of a row that do so below


def print_table(
    reports: list[dict[str, Any]],
    answers: Sequence[Sequence["Answers"]] = (),
    comparisons: Sequence["Comparison"] = (),
    baselines: Sequence["Baseline"] = (),
) -> None:
    """One model: value and standard error apart. Several: a column each; of two the better beyond noise in bold. Then
    published figures with their legend, and each model against the first in words.

    Args:
        answers: each report's figures with the documents' shares in them.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from lightlm.evaluate.compare.baselines import Legend
    from lightlm.evaluate.compare.comparison import NOISE, sentences

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Task", no_wrap=True)
    table.add_column("Metric", no_wrap=True)
    single = len(reports) == 1
    columns = ["Value", "Stderr"] if single else [escape(report["model"]) for report in reports]
    for heading in ["Documents", *columns, *(escape(baseline.name) for baseline in baselines)]:
        table.add_column(heading, justify="right", overflow="fold")
    legend = Legend()
    winners = {(one.task, one.metric): one.winner for one in comparisons} if len(reports) == 2 else {}
    for (task, metric), cells in _lines(answers).items():
        found = next(cell for cell in cells if cell)
        documents = "" if found.row.documents is None else f"{found.row.documents:,}"
        values = _value_and_stderr(found) if single else _side_by_side(cells, winners.get((task, metric)))
        published = [_published(baseline, found, reports[0]["limit"], legend) for baseline in baselines]
        cells_of_row = [*values, *published]
        if out.width < _WIDE and len(cells_of_row) > _IN_A_NARROW_LINE:
            cells_of_row = [text.replace(" ", "\n", 1) for text in cells_of_row]
        table.add_row(escape(task), escape(metric), documents, *cells_of_row)
    out.print(table)
    for line in legend.lines(baselines):
        out.print(line, soft_wrap=True, markup=False)
    for sentence in sentences(comparisons):
        out.print(sentence, soft_wrap=True, markup=False)
    if any(comparison.difference for comparison in comparisons):
        out.print(NOISE, soft_wrap=True)
    if any(report["active_parameters"] != report["parameters"] for report in reports):
        _print_sizes(reports)


def _lines(answers: Sequence[Sequence["Answers"]]) -> dict[tuple[str, str], list["Answers | None"]]:
    """Each task and metric, with what every model has for it."""
    lines: dict[tuple[str, str], list[Answers | None]] = {}
    for column, model in enumerate(answers):
        for one in model:
            lines.setdefault((one.row.task, one.row.metric), [None] * len(answers))[column] = one
    return lines


def _print_sizes(reports: list[dict[str, Any]]) -> None:
    """What a token costs, which with experts does not follow from the model's size."""
    from lightlm.quantities import format_quantity

    for report in reports:
        total, active, flops = (
            format_quantity(report[key]) for key in ("parameters", "active_parameters", "flops_per_token")
        )
        line = f"{report['model']}: {total} parameters, {active} active for a token, {flops} FLOPs a trained token"
        out.print(line, soft_wrap=True, markup=False)


def _value_and_stderr(cell: "Answers") -> list[str]:
    return [f"{cell.row.value:.4f}", "" if cell.row.stderr is None else f"{cell.row.stderr:.4f}"]


def _side_by_side(cells: Sequence["Answers | None"], winner: int | None) -> list[str]:
    texts = []
    for i, cell in enumerate(cells):
        text = "" if cell is None else f"{cell.row.value:.4f}"
        if cell and cell.row.stderr is not None:
            text += f" ± {cell.row.stderr:.4f}"
        texts.append(f"[bold]{text}[/]" if i == winner else text)
    return texts


def _published(baseline: "Baseline", cell: "Answers", limit: int | None, legend: "Legend") -> str:
    """The baseline's figure in this row, or a dash."""
    figures = baseline.find(cell.row.task, cell.row.metric)
    return legend.cell(figures[0], cell.protocol.num_fewshot, limit) if figures else "-"
