"""`lightlm eval --prefetch`: fetch the data of tasks without scoring."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lightlm.cli.console import console, out, print_json
from lightlm.errors import UsageError
from lightlm.evaluate.settings import Settings, split_list

if TYPE_CHECKING:
    from lightlm.evaluate.tasks.prefetch import Fetched

_USED = {"prefetch", "include_path", "data_dir", "as_json"}


def fetch_only(
    context: typer.Context, names: str, include_path: str | None, data_dir: str | None, as_json: bool
) -> None:
    """Fetch the data sets of these tasks into the Hub's cache or `data_dir`, and print them."""
    given = [
        parameter.opts[0] if parameter.param_type_name == "option" else "MODEL"
        for parameter in context.command.params
        if parameter.name not in _USED
        and str(context.get_parameter_source(parameter.name or "")).endswith("COMMANDLINE")
    ]
    if given:
        raise UsageError(
            f"--prefetch only fetches data; leave out {', '.join(given)}, and run the tasks with --tasks afterwards"
        )
    if data_dir is not None:
        if Path(data_dir).is_file():
            raise UsageError(f"--data-dir {data_dir} is a file, not a folder; choose another name")
        Path(data_dir).mkdir(parents=True, exist_ok=True)
    from lightlm.evaluate.tasks import references

    settings = Settings(split_list(names), include_path=include_path, data_dir=data_dir)
    references.check(settings)
    with console.status("Reading lm-eval's list of tasks ...") as status:
        from lightlm.evaluate.tasks.manager import Tasks
        from lightlm.evaluate.tasks.prefetch import prefetch

        chosen = Tasks(settings)
        fetched = prefetch(chosen, lambda title: status.update(f"Fetching {title} ..."))
    if as_json:
        print_json({"data_sets": [asdict(row) for row in fetched]})
    else:
        _print_table(fetched, data_dir)


def _print_table(fetched: list["Fetched"], data_dir: str | None) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    if not fetched:
        out.print("These tasks need no data set.")
        return
    table = Table("Tasks", "Data set", "Revision", Column("Files", justify="right"), Column("Bytes", justify="right"))
    for row in fetched:
        title = f"{row.data_set} ({row.config})" if row.config else row.data_set
        names = map(escape, (", ".join(row.tasks), title, (row.revision or "")[:8]))
        table.add_row(*names, f"{row.files:,}", f"{row.bytes:,}")
    out.print(table)
    elsewhere = [row.where for row in fetched if data_dir is None or not Path(row.where).is_relative_to(data_dir)]
    for places in ([row.where for row in fetched if row.where not in elsewhere], elsewhere):  # folder, then cache
        if places:
            out.print(f"In {os.path.commonpath(places)}", markup=False, soft_wrap=True)
