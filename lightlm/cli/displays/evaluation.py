"""The table that `lightlm eval` prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightlm.cli.console import out
from lightlm.quantities import format_quantity

if TYPE_CHECKING:
    from lightlm.evaluate.compare.table import ScoreTable

_WIDE = 110  # columns of a terminal; in a narrower one, many figures break before their standard errors
_LONG_METRIC = 18
_NARROW_FIGURES = 3  # figures per row that fit unbroken in a narrow terminal


_ASCII = {"↑": "^", "↓": "v", "±": "+-", "–": "-"}


def printable(text: str, encoding: str) -> str:
    """Return the text with the signs of the table replaced that the encoding of a stream lacks."""
    for sign, plain in _ASCII.items():
        try:
            sign.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace(sign, plain)
    return text


def print_scores(table: "ScoreTable", reports: Sequence[dict[str, Any]]) -> None:
    """Print the table, its notes and comparisons, and the sizes of models with experts.

    Args:
        reports: facts of each model: `model`, `parameters`, `active_parameters`, `flops_per_token`.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from lightlm.evaluate.compare.table import TEXT_COLUMNS

    fixed = table.figures_from
    narrow = out.width < _WIDE and len(table.columns) - fixed > _NARROW_FIGURES
    chance = TEXT_COLUMNS + 1 if narrow and fixed > TEXT_COLUMNS + 1 else None  # stands below the metric then
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(table.columns):
        text = number < TEXT_COLUMNS
        if number != chance:
            title = escape(printable(heading, out.encoding))
            drawn.add_column(title, justify="left" if text else "right", no_wrap=text, overflow="fold")
    for i, row in enumerate(table.rows):
        texts = [text.replace(" ", "\n", 1) if narrow and j >= fixed else text for j, text in enumerate(row)]
        if out.width < _WIDE and len(texts[TEXT_COLUMNS - 1]) > _LONG_METRIC:  # "exact_match (flexible-extract)"
            texts[TEXT_COLUMNS - 1] = texts[TEXT_COLUMNS - 1].replace(" (", "\n(", 1)
        if chance is not None and row[chance]:
            texts[TEXT_COLUMNS - 1] += f"\nchance {float(row[chance]):.2f}"
        texts = [escape(printable(text, out.encoding)) for text in texts]
        texts = [f"[bold]{text}[/]" if (i, j) in table.best else text for j, text in enumerate(texts)]
        drawn.add_row(*(text for j, text in enumerate(texts) if j != chance))
    out.print(drawn)
    for line in [*table.sentences, *table.notes]:
        out.print(printable(line, out.encoding), soft_wrap=True, markup=False)
    if any(report["active_parameters"] != report["parameters"] for report in reports):
        for report in reports:  # with experts, the compute per token does not follow from the number of parameters
            total, active, flops = (
                format_quantity(report[key]) for key in ("parameters", "active_parameters", "flops_per_token")
            )
            line = f"{report['model']}: {total} parameters, {active} active per token, {flops} FLOPs per trained token"
            out.print(line, soft_wrap=True, markup=False)
