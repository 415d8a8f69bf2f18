"""The table that `lightlm eval` prints."""

import re
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lightlm.cli.console import out
from lightlm.quantities import format_quantity

if TYPE_CHECKING:
    from rich.table import Table

    from lightlm.evaluate.compare.table import ScoreTable

_WIDE = 110  # columns of a terminal; in a narrower one, many figures break before their standard errors
_LONG_METRIC = 18
_HEADING = {False: 14, True: 8}  # columns in which the names of models are broken; narrow: as wide as "± 0.1234"
_BETWEEN, _MARGIN = 2, 1  # columns after each column, and before the first
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
    for drawn in _drawn(table):
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


def _broken(name: str, width: int) -> list[str]:
    """Return a name in lines of at most `width` columns, broken after a sign where that is possible."""
    lines = [""]
    for part in re.findall(r"[^-_/. ]*[-_/. ]?", name):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [piece for line in lines for piece in wrap(line, width)]


def _drawn(table: "ScoreTable") -> "Iterator[Table]":
    """Yield the table, or several with the same rows where its columns of figures do not fit beside each other."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from lightlm.evaluate.compare.table import TEXT_COLUMNS

    fixed = table.figures_from
    narrow = out.width < _WIDE and len(table.columns) - fixed > _NARROW_FIGURES
    chance = TEXT_COLUMNS + 1 if narrow and fixed > TEXT_COLUMNS + 1 else None  # stands below the metric then
    cells = [list(row) for row in table.rows]
    for row in cells:
        if out.width < _WIDE and len(row[TEXT_COLUMNS - 1]) > _LONG_METRIC:  # "exact_match (flexible-extract)"
            row[TEXT_COLUMNS - 1] = row[TEXT_COLUMNS - 1].replace(" (", "\n(", 1)
        if chance is not None and row[chance]:
            row[TEXT_COLUMNS - 1] += f"\nchance {float(row[chance]):.2f}"
        if narrow:
            row[fixed:] = [text.replace(" ", "\n", 1) for text in row[fixed:]]

    headings = list(table.columns)
    for column in range(fixed, len(headings)):
        parts = headings[column].split("\n")
        headings[column] = "\n".join(line for part in parts for line in _broken(part, _HEADING[narrow]))

    def width(column: int) -> int:
        lines = [line for row in cells for line in row[column].split("\n")]
        return _BETWEEN + max(map(len, [*lines, *headings[column].split("\n")]))

    begin = [column for column in range(fixed) if column != chance]
    figures = list(range(fixed, len(table.columns)))
    while figures:
        room, count = out.width - _MARGIN - sum(map(width, begin)), 0
        while count < len(figures) and (count == 0 or room >= width(figures[count])):
            room -= width(figures[count])
            count += 1
        shown, figures = begin + figures[:count], figures[count:]
        drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in shown:
            text, title = column < TEXT_COLUMNS, escape(printable(headings[column], out.encoding))
            drawn.add_column(title, justify="left" if text else "right", no_wrap=text, overflow="fold")
        for i, row in enumerate(cells):
            texts = {column: escape(printable(row[column], out.encoding)) for column in shown}
            drawn.add_row(*(f"[bold]{t}[/]" if (i, j) in table.best else t for j, t in texts.items()))
        yield drawn
        begin = list(range(TEXT_COLUMNS))
