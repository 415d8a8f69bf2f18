"""The command line's streams: messages and progress go to standard error, results to standard output."""

import json
import os
from collections.abc import Container, Iterable, Sequence
from typing import Any

from rich.console import Console

# Of several processes, only the first prints.
_silent = os.environ.get("RANK", "0") != "0"
console = Console(stderr=True, highlight=False, quiet=_silent)
out = Console(highlight=False, quiet=_silent)


def print_json(document: Any) -> None:
    """Print the one JSON document that `--json` promises on standard output."""
    if not out.quiet:
        print(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def print_table(
    rows: Iterable[Sequence[str]],
    *headings: str,
    right: Container[int] = (),
    whole: Container[int] = (),
    **style: Any,
) -> None:
    """Print a table of texts, in which brackets are no markup; `style` goes to rich's `Table`.

    Columns numbered in `right` are right-aligned; these and those in `whole` never wrap.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, title_justify="left", show_header=bool(headings), **style)
    for row in rows:
        table.add_row(*map(Text, row))
    for i, column in enumerate(table.columns):
        column.justify, column.overflow = "right" if i in right else "left", "fold"
        column.no_wrap = i in right or i in whole
    out.print(table)
