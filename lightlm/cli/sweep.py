"""`lightlm sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightlm.cli.console import console, out, print_json, print_table
from lightlm.errors import UsageError

if TYPE_CHECKING:
    from lightlm.sweep.engine import Ending, Overview
    from lightlm.sweep.table import Results
    from lightlm.sweep.values import Range

_NAME_KEYS = 4  # swept keys in a sweep's default name


def sweep(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one (lightlm recipes ls)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=a,b,c",
            help="Values to try, such as optimizer.lr=1e-3,3e-3; with one value, a change of all runs. With --search "
            "also ranges: optimizer.lr=1e-4..1e-2.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Seeds per value: the recipe's, and the next N - 1. [dim]Default: 1[/]"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Folder under sweeps/; an existing sweep resumes. [dim]Default: recipe and keys[/]"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Runs at a time. [dim]Default: 1, or one per GPU[/]")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time limit of this call, such as 30min or 2h; the same command resumes the sweep later.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="Train each run for about M minutes, in place of train.tokens."),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Let optuna draw N combinations, instead of running all of a grid."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="KEY", help="Metric of metrics.jsonl to compare. [dim]Default: val_loss[/]")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="VALUE", help="Value that the others are compared with. [dim]Default: the first[/]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the sweep of this name, after checking the new one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all recipes and list the runs; run none.")] = False,
    show: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print the table of a sweep so far, and run nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as one JSON document.")] = False,
) -> None:
    """Train a recipe with every combination of values and seeds, and compare the results.

    The same command resumes a sweep that was stopped; another value or seed extends it. Runs, table and plots are in
    sweeps/NAME.
    """
    if show is not None:
        if recipe is not None or settings:
            raise UsageError("--show NAME takes no recipe and no settings; it runs nothing")
        _show(show, metric, baseline, as_json)
        return
    from lightlm.cli.train import is_override

    if recipe is None or is_override(recipe):
        raise UsageError("name a recipe, for example `lightlm sweep recipes/demo.yaml optimizer.lr=1e-3,3e-3`")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UsageError(f"--minutes {minutes:g}: it must be a number above 0")

    from lightlm.cli.displays.sweep import SweepDisplay
    from lightlm.sweep.cells import choose_seeds, contestant, grid
    from lightlm.sweep.run import Limits, Sweep
    from lightlm.sweep.values import read_duration, read_settings

    try:
        seconds = None if budget is None else read_duration(budget)
    except ValueError as error:
        raise UsageError(f"--budget {budget}: {error}") from None
    lists = read_settings(settings or [])
    if minutes is not None and "train.tokens" in lists:
        raise UsageError("--minutes and train.tokens both set the length of a run; leave one out")
    chosen_seeds = choose_seeds(recipe, lists, seeds)
    space = _space(lists, search=search is not None)
    fixed = [f"{key}={values[0]}" for key, values in lists.items() if key not in space]
    contestants = [contestant(recipe, {}, fixed)] if search else grid(recipe, lists)
    path = _folder(name, recipe, [*space, *(["search"] if search else [])])
    limits, display = Limits(jobs, seconds, minutes), SweepDisplay()
    if dry_run:
        planned = Sweep.peek(path, limits, overwrite=overwrite, watch=display)
        planned.add(contestants, chosen_seeds)
        _print_plan(path, planned.overview(), search or 0, as_json)
        return
    with Sweep.open(path, limits, overwrite=overwrite, watch=display) as opened, display:
        if search:
            from lightlm.sweep.search import run_search

            if baseline not in (None, contestants[0].name):
                opened.check_baseline(baseline)  # draws that begin now have no name yet
            ending = run_search(opened, recipe, space, fixed, chosen_seeds, search, metric)
        else:
            opened.add(contestants, chosen_seeds)
            opened.check_baseline(baseline)
            ending = opened.run()
        display.stop()
        results = opened.results(metric, baseline)
        plots = _draw(results)
        overview = opened.overview()
    _print(results, plots, as_json, best_first=search is not None)
    _conclude(path, ending, overview)


def _space(settings: "dict[str, list[str]]", *, search: bool) -> "dict[str, Range | list[str]]":
    """Return what varies: the keys with several values, and those with a range.

    Raises:
        UsageError: a range is given without a search, a range is empty or in a list, or a search has nothing to vary.
    """
    from lightlm.sweep.values import read_range

    space: dict[str, Range | list[str]] = {}
    for key, values in settings.items():
        try:
            ranges = [found for value in values if (found := read_range(value)) is not None]
        except ValueError as error:
            raise UsageError(f"{key}: {error}") from None
        if ranges and not search:
            raise UsageError(f"{key}={values[0]} is a range; add --search N to draw from it, or list its values")
        if ranges and len(values) > 1:
            raise UsageError(f"{key}={','.join(values)}: give one range, or a list of values")
        if ranges or len(values) > 1:
            space[key] = ranges[0] if ranges else list(dict.fromkeys(values))
    if search and not space:
        raise UsageError("--search needs something to vary, such as optimizer.lr=1e-4..1e-2")
    return space


def _folder(name: str | None, recipe: str, keys: list[str]) -> Path:
    """Return the folder of a sweep: by its name, else by its recipe and the keys that vary."""
    import re

    from lightlm.recipe import NAME_PATTERN
    from lightlm.sweep.cells import folder_name, short_keys
    from lightlm.sweep.folder import SWEEPS

    if name is None:
        stem = Path(recipe).stem
        parts = [stem if stem.isascii() else folder_name(stem), *list(short_keys(keys).values())[:_NAME_KEYS]]
        return SWEEPS / re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).lstrip("._-")
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(f"--name {name}: use letters, digits, '.', '_' and '-'")
    return SWEEPS / name


def _show(name: str, metric: str | None, baseline: str | None, as_json: bool) -> None:
    from lightlm.sweep.folder import find_sweep
    from lightlm.sweep.run import table_of

    folder = find_sweep(name)
    definition = folder.read()
    assert definition is not None  # `find_sweep` has found it
    results = table_of(folder, definition, metric, baseline)
    _print(results, _draw(results), as_json)


def _draw(results: "Results") -> dict[str, str]:
    """Draw the plots and return their files. The runs are safe, so a failure is only a note."""
    from lightlm.sweep.plots import write_plots

    try:
        with console.status("Drawing ..."):
            return {name: str(path) for name, path in write_plots(results).items()}
    except Exception as error:
        console.print(f"[yellow]Note:[/] no plots were made ({error})", soft_wrap=True)
        return {}


def _print(results: "Results", plots: dict[str, str], as_json: bool, *, best_first: bool = False) -> None:
    if as_json:
        print_json(results.to_dict() | {"plots": plots})
        return
    from lightlm.cli.displays.sweep import print_results

    print_results(results, plots, best_first=best_first)


def _conclude(path: Path, ending: "Ending", overview: "Overview") -> None:
    """Say what is missing, and exit with 130 after an interruption and with 1 if runs failed."""
    missing = overview.count("waiting", "interrupted", "running")
    failed = [row for row in overview.rows if row.state == "failed"]
    if missing:
        why = "Interrupted" if ending == "interrupted" else "The budget is used up"
        left = [row.cell.name for row in overview.rows if row.state in ("waiting", "interrupted", "running")]
        console.print(
            f"{why}: {missing} of {len(overview.rows)} runs are missing ({', '.join(left[:5])}"
            f"{', ...' if missing > 5 else ''}). Progress is saved. Rerun the same command to resume.",
            soft_wrap=True,
            markup=False,
        )
    if ending == "interrupted":
        raise typer.Exit(130)
    if failed:
        console.print(
            f"{len(failed)} of {len(overview.rows)} runs failed; see {path / 'logs'}. Rerun the same command to try "
            "them again.",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(1)


def _print_plan(path: Path, overview: "Overview", draws: int, as_json: bool) -> None:
    """Print the runs of a sweep and their states; those of a search are not known yet."""
    if as_json:
        runs = [{"name": row.cell.name, "state": row.state, "changes": row.cell.changes} for row in overview.rows]
        print_json({"folder": str(path), "runs": runs, "draws": draws, "seconds_left": overview.left})
        return
    from rich.box import SIMPLE_HEAD

    from lightlm.cli.displays.sweep import duration

    rows = [(row.cell.name, row.state, " ".join(row.cell.changes)) for row in overview.rows]
    print_table(rows, "run", "state", "changes", whole=[0, 1], box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    left = overview.count("waiting", "interrupted", "failed")
    time = f"about {duration(overview.left)}" if overview.left else "`lightlm plan` measures the time of one"
    then = f", then {draws} draws" if draws else ""
    out.print(f"{left} of {len(overview.rows)} runs to go in {path}{then}; {time}", soft_wrap=True, markup=False)
