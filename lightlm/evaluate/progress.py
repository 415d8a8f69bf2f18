"""The progress bar of an evaluation."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def bar(total: int, description: str, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on standard error that the yielded function moves on; nothing where standard error is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
