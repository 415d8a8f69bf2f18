"""The sources and evaluation sets that the options of `lightlm prepare-data` name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightlm.data.select.decontamination import Decontaminator
    from lightlm.data.select.filters import Filter
    from lightlm.data.sources.base import Source


_MIX = re.compile(r"[^=,]+=[\d.]+(,[^=,]+=[\d.]+)+")  # a=0.7,b=0.3


def refuse_mixture(source: str | None, mix: str | None) -> None:
    """Raise UsageError for a mixture of sources, which earlier versions prepared."""
    from lightlm.errors import UsageError

    if mix is not None or (source is not None and _MIX.fullmatch(source) and not Path(source).exists()):
        raise UsageError(
            "prepare-data takes one SOURCE; mixtures are made while training. Prepare each source by itself, with one "
            "--tokenizer, and write the shares into the recipe: data: {mix: {A: 0.7, B: 0.3}}"
        )


def open_named(source: str | None, text_column: str, row_filter: Filter | None) -> Source:
    """Open the source that SOURCE names. Raises UsageError where there is none."""
    from lightlm.data.sources.registry import open_source
    from lightlm.errors import UsageError

    if source is None:
        raise UsageError("name a SOURCE (for example pydocs, fineweb-edu, a path)")
    return open_source(source, text_column, row_filter)


@contextlib.contextmanager
def opened(
    source: str | None, text_column: str, row_filter: Filter | None, out: Path | None
) -> Iterator[tuple[Source, Path]]:
    """Give the source and the folder to write."""
    from lightlm.data.sources.stdin import NAME, SPEC, standard_input

    if source == SPEC:
        folder = out or Path("data") / NAME
        with standard_input(folder, text_column, row_filter) as piped:
            yield piped, folder
        return
    named = open_named(source, text_column, row_filter)
    yield named, out or Path("data") / named.name


def evaluation_sets(names: str | None, contaminated: str) -> Decontaminator | None:
    """Return the index of the evaluation sets of `--decontaminate`. Raises UsageError and DataError."""
    from lightlm.errors import UsageError

    if names is None:
        if contaminated != "drop":
            raise UsageError(f"--contaminated {contaminated} needs --decontaminate TASKS")
        return None
    from lightlm.cli.console import console
    from lightlm.evaluate.tasks import references

    tasks = [name.strip() for name in names.split(",") if name.strip()]
    references.check_names(tasks)
    with console.status("Reading the evaluation sets ..."):
        from lightlm.data.select.decontamination import Decontaminator
        from lightlm.evaluate.tasks.examples import scored_examples

        return Decontaminator(scored_examples(tasks), drops=contaminated == "drop")


def read_template(path: Path | None) -> str | None:
    """Return the chat template in a file. Raises UsageError where it cannot be read."""
    from lightlm.errors import UsageError

    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {path}: cannot be read ({error})") from error
