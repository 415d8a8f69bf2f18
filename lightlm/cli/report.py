"""`lightlm report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, out, print_json
from lightlm.errors import UsageError
from lightlm.evaluate.compare.baselines import split_names

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
    compare: Annotated[
        str | None,
        typer.Option(metavar="B1,B2", help="Published figures beside the scores (gpt2, mobilellm-125m, ...)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print paths and summaries as one JSON document.")] = False,
) -> None:
    """Plot runs: metrics -> one page and PNGs. Several runs are overlaid, and their stored scores compared."""
    baselines, models = split_names(compare or "")
    if models:
        raise UsageError(
            f"--compare {models[0]}: a report reads what is stored; name a run beside the others, or score the model "
            f"with `lightlm eval --compare {models[0]}`"
        )
    with console.status("Drawing ..."):
        from lightlm.report.build import write_report
        from lightlm.runs import find_run

        references: list[str | None] = list(runs) if runs else [None]
        written = write_report([find_run(reference) for reference in references], out_path, baselines)
    if as_json:
        print_json(_document(written))
        return
    from lightlm.evaluate.compare.comparison import sentences
    from lightlm.report.scores import Scores

    _print_table(written)
    for record in written.records:
        for note in record.notes:
            console.print(f"{record.name}: {note}", soft_wrap=True, markup=False)
    for sentence in sentences(Scores(written.records).comparisons()):
        out.print(sentence, soft_wrap=True, markup=False)
    out.print(f"Page {written.page}", soft_wrap=True, markup=False)
    out.print(f"{len(written.plots)} plots in {written.page.parent / 'plots'}", soft_wrap=True, markup=False)


def _document(written: "Report") -> dict[str, Any]:
    from lightlm.report.scores import Scores

    return {
        "page": str(written.page),
        "plots": {name: str(path) for name, path in written.plots.items()},
        "runs": [record.summary() | {"notes": record.notes} for record in written.records],
        "comparisons": [comparison.to_dict() for comparison in Scores(written.records).comparisons()],
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
