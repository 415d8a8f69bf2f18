"""`lightlm report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, out, print_json

if TYPE_CHECKING:
    from lightlm.report.build import Report


def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN ...]", help="Runs by path or name; the newest unless given.")
    ] = None,
    out_path: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder; the run's, or runs/compare-A-B for several, unless given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print paths and summaries as one JSON document.")] = False,
) -> None:
    """Plot runs: metrics -> one page and PNGs. Several runs are overlaid."""
    with console.status("Drawing ..."):
        from lightlm.checkpoint import find_run
        from lightlm.report.build import write_report

        references: list[str | None] = list(runs) if runs else [None]
        written = write_report([find_run(reference) for reference in references], out_path)
    if as_json:
        print_json(_document(written))
        return
    _print_table(written)
    for record in written.records:
        for note in record.notes:
            console.print(f"{record.name}: {note}", soft_wrap=True, markup=False)
    out.print(f"Page {written.page}", soft_wrap=True, markup=False)
    out.print(f"{len(written.plots)} plots in {written.page.parent / 'plots'}", soft_wrap=True, markup=False)


def _document(written: "Report") -> dict[str, Any]:
    return {
        "page": str(written.page),
        "plots": {name: str(path) for name, path in written.plots.items()},
        "runs": [record.summary() | {"notes": record.notes} for record in written.records],
    }


def _print_table(written: "Report") -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from lightlm.report.summary import summary_table

    headings, rows = summary_table(written.records, short=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Run", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for record, row in zip(written.records, rows, strict=True):
        table.add_row(*map(escape, [record.name, *row]))
    out.print(table)
