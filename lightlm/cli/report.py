"""The command `lightlm report`."""

from pathlib import Path
from typing import Annotated

import typer

from lightlm.cli.console import console, out, print_json, print_table
from lightlm.errors import UsageError


def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="Runs by path or name. [dim]Default: the newest[/]")
    ] = None,
    out_path: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder. [dim]Default: the run's; for several runs/compare-A-B[/]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that exists at --out.")] = False,
    compare: Annotated[
        str | None,
        typer.Option(metavar="B1,B2", help="Show published scores beside the runs' (gpt2, mobilellm-125m, ...)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print paths and summaries as one JSON document.")] = False,
) -> None:
    """Plot runs as one page and PNG files. Several runs share each plot, and their stored scores are compared."""
    from lightlm.evaluate.compare.baselines import split_names

    baselines, models = split_names(compare or "", lambda note: None)  # a run of that name is an argument of its own
    if models:
        raise UsageError(
            f"--compare {models[0]}: a report only reads stored scores; name a run as an argument instead, or score "
            f"the model with `lightlm eval --compare {models[0]}`"
        )
    if out_path is not None and not overwrite:
        for existing in (out_path / "report.html", *(out_path / "plots").glob("*.png")):
            if existing.exists():
                raise UsageError(
                    f"{existing} exists already; choose another folder with --out, or replace it with --overwrite"
                )
    from lightlm.runs import find_run

    references: list[str | None] = list(runs) if runs else [None]
    found = [find_run(reference) for reference in references]
    with console.status("Drawing ..."):
        from lightlm.report.build import write_report

        written = write_report(found, out_path, baselines)
    if as_json:
        runs_found = [record.summary() | {"notes": record.notes} for record in written.records]
        plots = {name: str(path) for name, path in written.plots.items()}
        comparisons = [comparison.to_dict() for comparison in written.comparisons]
        print_json({"page": str(written.page), "plots": plots, "runs": runs_found, "comparisons": comparisons})
        return
    from rich.box import SIMPLE_HEAD

    from lightlm.evaluate.compare.comparison import sentences
    from lightlm.report.summary import summary_table

    headings, rows = summary_table(written.records, short=True)
    texts = [[record.name, *row] for record, row in zip(written.records, rows, strict=True)]
    numbers = range(1, len(headings) + 1)
    print_table(texts, "Run", *headings, right=numbers, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for record in written.records:
        for note in record.notes:
            console.print(f"{record.name}: {note}", soft_wrap=True, markup=False)
    from lightlm.evaluate.compare.table import unmatched
    from lightlm.report.scores import score_lines

    for line in unmatched(baselines, score_lines(written.records)):
        console.print(f"--compare: {line}", soft_wrap=True, markup=False)
    made = [f"Page {written.page}", f"{len(written.plots)} plots in {written.page.parent / 'plots'}"]
    for line in [*sentences(written.comparisons), *made]:
        out.print(line, soft_wrap=True, markup=False)
