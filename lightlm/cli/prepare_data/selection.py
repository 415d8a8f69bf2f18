"""What `lightlm prepare-data` takes text from, and what it looks for in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightlm.data.select.decontamination import Decontaminator
    from lightlm.data.select.filters import Filter
    from lightlm.data.sources.base import Source


def open_named(source: str | None, mix: str | None, text_column: str, chosen: Filter | None) -> Source:
    """The source that SOURCE or --mix names. Raises UsageError unless it is one of both."""
    from lightlm.data.prepare.mixing.schedule import parse_mix
    from lightlm.data.prepare.mixing.source import MixtureSource
    from lightlm.data.sources.registry import open_source
    from lightlm.errors import UsageError

    if source is not None and mix is not None:
        raise UsageError(f"SOURCE {source} and --mix {mix} exclude each other; name all sources in --mix")
    if mix is not None:
        return MixtureSource([(open_source(spec, text_column, chosen), share) for spec, share in parse_mix(mix)])
    if source is None:
        raise UsageError("name a SOURCE (for example pydocs, fineweb-edu, a path), or several with --mix")
    return open_source(source, text_column, chosen)


@contextlib.contextmanager
def opened(
    source: str | None, mix: str | None, text_column: str, chosen: Filter | None, out: Path | None
) -> Iterator[tuple[Source, Path]]:
    """The source, and the folder to write."""
    from lightlm.data.sources.stdin import NAME, SPEC, standard_input

    if source == SPEC and mix is None:
        folder = out or Path("data") / NAME
        with standard_input(folder, text_column, chosen) as piped:
            yield piped, folder
        return
    named = open_named(source, mix, text_column, chosen)
    yield named, out or Path("data") / named.name


def parse_filter(text: str | None) -> Filter | None:
    """`--filter`. Raises UsageError."""
    from lightlm.data.select.filters import Filter

    return None if text is None else Filter(text)


def evaluation_sets(names: str | None, contaminated: str) -> Decontaminator | None:
    """The evaluation sets of `--decontaminate`, indexed. Raises UsageError and DataError."""
    from lightlm.errors import UsageError

    if contaminated not in ("drop", "flag"):
        raise UsageError(f"--contaminated {contaminated}: choose drop or flag")
    if names is None:
        if contaminated != "drop":
            raise UsageError(f"--contaminated {contaminated} says what to do with what --decontaminate TASKS finds")
        return None
    from lightlm.cli.console import console

    with console.status("Reading the evaluation sets ..."):
        from lightlm.data.select.decontamination import Decontaminator
        from lightlm.evaluate.tasks.examples import scored_examples

        chosen = [name.strip() for name in names.split(",") if name.strip()]
        return Decontaminator(scored_examples(chosen), drops=contaminated == "drop")
