"""The progress bar of an evaluation."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def bar(total: int, description: str, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Draw a bar on standard error and yield the function that advances it; draw nothing without a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
