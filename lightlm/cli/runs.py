"""`lightlm runs`: the runs in `runs/`."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightlm.cli.console import console, print_json, print_table
from lightlm.errors import CheckpointError, UsageError
from lightlm.quantities import short_form

if TYPE_CHECKING:
    from lightlm.runs.listing import Summary

runs = typer.Typer(no_args_is_help=True, help="List and delete runs; print the folder of one.")

_AGES = (("days", 86_400), ("h", 3600), ("min", 60))


@runs.command("ls")
def list_runs(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List the runs in runs/, newest first: state, steps, loss, size and age.

    A complete run has seen all tokens of its recipe. A stopped one has saved its last step; an interrupted one was
    killed after its last checkpoint. Both resume with `lightlm train --resume NAME`.
    """
    from lightlm.runs import RUNS
    from lightlm.runs.listing import list_runs

    found = list_runs()
    if as_json:
        print_json([run.to_dict() for run in found])
        return
    if not found:
        console.print(f"No runs in {RUNS.absolute()}", markup=False, soft_wrap=True)
        return
    headings = ["run", "state", "step", "tokens", "loss", "val loss", "size", "age"]
    from rich.box import SIMPLE_HEAD

    table = [_row(run) for run in found]
    if any(run.init_from for run in found):
        headings.append("started from")
        for row, run in zip(table, found, strict=True):
            row.append(run.init_from or "")
    print_table(table, *headings, right=range(2, 8), whole=[0], box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


@runs.command("rm")
def remove_runs(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Runs, by name or as runs/NAME.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete runs with their checkpoints, after a question. A link in runs/ is deleted, not what it leads to."""
    from lightlm.runs import remove_run, require_unlocked
    from lightlm.runs.listing import disk_bytes, mend_latest

    chosen = list(dict.fromkeys(_named(name) for name in names))
    for run in chosen:
        require_unlocked(run)
    for run in chosen:
        what = "a link; the folder that it leads to stays" if run.is_symlink() else _size(disk_bytes(run))
        console.print(f"{run}: {what}", markup=False, soft_wrap=True)
    if not yes:
        if not _answers():
            raise UsageError("nothing is deleted without an answer; give --yes to delete without asking")
        count = f"{len(chosen)} runs" if len(chosen) > 1 else str(chosen[0])
        if not typer.confirm(f"Delete {count}?", err=True):
            raise typer.Exit(1)
    for run in chosen:
        remove_run(run)
    deleted = ", ".join(str(run) for run in chosen)
    latest = mend_latest()
    console.print(
        f"Deleted {deleted}{f'; runs/latest is now {latest.name}' if latest else ''}", markup=False, soft_wrap=True
    )


@runs.command("path")
def print_path(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A run by name or path; the newest unless given.")
    ] = None,
) -> None:
    """Print the folder of a run, as in `ls $(lightlm runs path)`."""
    from lightlm.runs import find_run

    print(find_run(name))


def _answers() -> bool:
    """Return whether a person can answer a question."""
    return sys.stdin.isatty()


def _named(name: str) -> Path:
    """Return the run `runs/NAME`; other folders are not deleted."""
    from lightlm.runs import RECIPE, RUNS, find_run, run_names

    path = Path(name)
    if path.name == "latest":
        path = find_run(path)
    inside = path if path.parent.resolve() == RUNS.resolve() and len(path.parts) > 1 else RUNS / path
    if inside.parent.resolve() != RUNS.resolve() or path.name in ("", "..", "."):
        raise CheckpointError(f"{name} does not lie in {RUNS}, and nothing else is deleted; runs here: {run_names()}")
    if not (inside / RECIPE).is_file():
        raise CheckpointError(f"{inside} is not a run: it holds no {RECIPE}; runs here: {run_names()}")
    return RUNS / inside.name


def _row(run: "Summary") -> list[str]:
    from lightlm.quantities import format_quantity

    tokens = "-" if run.tokens is None else format_quantity(run.tokens)
    of = "" if run.target_tokens is None else f" of {format_quantity(run.target_tokens)}"
    losses = ["-" if loss is None else f"{loss:.4f}" for loss in (run.loss, run.val_loss)]
    state = f"training by {run.trainer.short}" if run.trainer else run.state
    return [run.path.name, state, f"{run.step:,}", tokens + of, *losses, _size(run.size), _age(run.modified)]


def _size(count: int) -> str:
    """Return bytes as people read them, in powers of 1,000."""
    return short_form(count, ((" bytes", 1), (" kB", 1e3), (" MB", 1e6), (" GB", 1e9)))


def _age(modified: float) -> str:
    seconds = max(0.0, time.time() - modified)
    for unit, length in _AGES:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
