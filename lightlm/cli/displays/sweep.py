"""What `lightlm sweep` shows while it runs, and its table at the end."""

import contextlib
import time

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightlm.cli.console import console as standard_error
from lightlm.cli.console import out, print_table
from lightlm.quantities import format_quantity
from lightlm.sweep.engine import Overview, Row, Watch
from lightlm.sweep.folder import STATES, End
from lightlm.sweep.table import Line, Results

_PLAIN_SECONDS = 60.0  # between lines of progress where there is no live table
_LIVE_SECONDS = 1.0
_SHOWN = 24  # rows of the live table; those that are done scroll away first


def duration(seconds: float | None) -> str:
    """Return a time as people read it."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class SweepDisplay(Watch, contextlib.AbstractContextManager["SweepDisplay"]):
    """A table that updates in a terminal; elsewhere, a line for each run that starts or ends and one a minute."""

    def __init__(self, console: Console = standard_error) -> None:
        self._console, self._shown = console, 0.0
        self._live: Live | None = None

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the live table."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        self._log(f"[yellow]Note:[/] {escape(text)}")

    def started(self, row: Row, overview: Overview) -> None:
        self._shown = time.monotonic()
        if not self._is_live():
            resumed = f", resumed at {row.share:.0%}" if row.share else ""
            self._log(f"{escape(row.cell.name)}: started{resumed}")

    def ended(self, row: Row, end: End, overview: Overview) -> None:
        text = f"{overview.count('done', 'diverged', 'failed')}/{len(overview.rows)}  {row.cell.name}: {end.state}"
        if end.state == "done" and row.val_loss is not None:
            text += f", validation loss {row.val_loss:.4f}"
        text += f", {duration(end.seconds)}"
        if overview.left:
            text += f"; about {duration(overview.left)} left"
        self._log(escape(text) if not end.message else f"{escape(text)}\n  [red]{escape(end.message)}[/]")

    def progress(self, overview: Overview) -> None:
        now = time.monotonic()
        if self._is_live():
            if now - self._shown >= _LIVE_SECONDS:
                self._shown = now
                self._draw(overview)
        elif now - self._shown >= _PLAIN_SECONDS:
            self._shown = now
            running = ", ".join(f"{row.cell.name} {row.share:.0%}" for row in overview.rows if row.state == "running")
            self._log(escape(f"{_summary(overview)}: {running}"))

    def _is_live(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _log(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _draw(self, overview: Overview) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Group(Text(_summary(overview)), _live_table(overview)), refresh=True)


def _summary(overview: Overview) -> str:
    counts = ", ".join(f"{count} {state}" for state in STATES if (count := overview.count(state)))
    return f"{counts}; about {duration(overview.left)} left" if overview.left else counts


def _live_table(overview: Overview) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("run", "state", "val loss", "time", "left"):
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
    rows = overview.rows
    if len(rows) > _SHOWN:  # what runs, what comes next, then what was last
        order = {"running": 0, "waiting": 1, "interrupted": 1}
        rows = sorted(rows, key=lambda row: order.get(row.state, 2))[:_SHOWN]
    for row in rows:
        state = f"{row.state} {row.share:.0%}" if row.state == "running" else row.state
        loss = "-" if row.val_loss is None else f"{row.val_loss:.4f}"
        table.add_row(Text(row.cell.name), state, loss, duration(row.seconds or None), duration(row.left))
    return table


def print_results(results: Results, plots: dict[str, str], *, best_first: bool) -> None:
    """Print the table, its rule and the places of the plots."""
    from rich.box import SIMPLE_HEAD

    lines = results.best_first() if best_first else results.lines
    spread = any(line.std is not None for line in lines)
    headings = ["", "runs", results.metric, *(["std"] if spread else []), "difference", *(["95%"] if spread else [])]
    headings += [*(["p"] if spread else []), "tokens", "time", ""]
    table = [_cells(line, spread) for line in lines]
    print_table(
        table,
        *headings,
        right=range(1, len(headings) - 1),
        whole=[len(headings) - 1],
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for text in [*_explanation(results, spread), *results.notes]:
        out.print(text, soft_wrap=True, markup=False)
    if plots:
        out.print(f"Plots: {', '.join(plots.values())}", soft_wrap=True, markup=False)


def _cells(line: Line, spread: bool) -> list[str]:
    done, all_runs, paired = len(line.finals), len(line.states), line.paired
    cells = [line.contestant.name, str(done) if done == all_runs else f"{done} of {all_runs}"]
    cells.append("-" if line.mean is None else f"{line.mean:.4f}")
    if spread:
        cells.append("-" if line.std is None else f"{line.std:.4f}")
    cells.append("-" if paired is None else f"{paired.value:+.4f}")
    if spread:
        cells.append("-" if paired is None or paired.margin is None else f"±{paired.margin:.4f}")
        cells.append("-" if paired is None or paired.p_value is None else f"{paired.p_value:.3f}")
    cells.append("-" if line.tokens is None else format_quantity(line.tokens))
    return [*cells, duration(line.seconds), "" if line.verdict == "one seed" else line.verdict]


def _explanation(results: Results, spread: bool) -> list[str]:
    better = "higher" if results.more_is_better else "lower"
    base = f"{results.metric}: {better} is better. Differences are to {results.baseline}"
    if not any(line.paired for line in results.lines):
        return []
    if not spread:
        return [f"{base}. One seed: no test. The spread of seeds is unknown; --seeds 3 measures it."]
    rule = "better or worse: p below 0.05 in the paired t-test over seeds, adjusted for all comparisons (Holm)"
    return [f"{base}, on the same seeds. {rule}; noise otherwise. 95%: half of the interval of one difference."]
