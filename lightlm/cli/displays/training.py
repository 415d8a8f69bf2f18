"""What `lightlm train` shows: a live line and a log in a terminal, plain lines elsewhere."""

import contextlib
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from lightlm.cli.console import console as standard_error
from lightlm.quantities import format_quantity
from lightlm.train.observe.observers import Observer

# Seconds between plain log lines: 10 at first, one more per minute, 60 after 50 minutes; a day's log has 1,500 lines.
_PLAIN_SECONDS = (10.0, 60.0)
_SPEED_STEPS = 20  # steps over which the shown speed is averaged
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model may generate codes that move the cursor
# Cells that the live line leaves out, in this order, until it fits.
_LEAST_IMPORTANT = ("data wait", "MFU", "grad norm", "memory", "lr", "MTP loss", "validation", "elapsed", "tokens/s")
_LEAST_IMPORTANT_OF_EXPERTS = ("dropped", "bias range", "entropy", "by layer", "dead experts")
# Name, metric and format of each cell on the balance of experts.
_EXPERT_CELLS = (
    ("imbalance", "moe/violation", ".2f"),
    ("worst layer", "moe/violation_worst", ".2f"),
    ("entropy", "moe/entropy", ".3f"),
    ("dead experts", "moe/dead_experts", ","),
    ("bias range", "moe/bias_range", ".3f"),
    ("dropped", "moe/dropped", ","),
)
_EXPERT_LEGEND = (
    "Experts: imbalance is the tokens of a layer's busiest expert over an equal share, minus 1 (0 is balanced): the "
    "mean of the layers, and the worst layer. entropy: of the loads (1 is balanced). dead experts: no token in the "
    "step. bias range: of the router's balancing bias."
)
_LEVELS = "▁▂▃▄▅▆▇█"  # imbalance of a layer from 0 to 1 or more; 1 is an expert with twice its share


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _validation(metrics: dict[str, Any]) -> str:
    return f"[bold]validation {metrics['val_loss']:.4f} ({metrics['val_bpb']:.4f} bits per byte)[/]"


def _epochs(number: float) -> str:
    return f"{number:,.0f} epochs" if number >= 10 else f"{number:.2g} epochs"


def describe_source(part: dict[str, Any]) -> str:
    """Return what a run reads of one source (`Setup.sources`), such as `7M tokens, 1.4 epochs of 5M`."""
    tokens, size = format_quantity(part["tokens"]), format_quantity(part["train_tokens"])
    return f"{tokens} tokens, {_epochs(part['epochs'])} of {size}"


class TrainingDisplay(Observer, contextlib.AbstractContextManager["TrainingDisplay"]):
    """An `Observer` that prints to standard error.

    A terminal that can move its cursor shows a live line. A pipe, a file or TERM=dumb gets whole lines only, also if
    FORCE_COLOR asks for colors.
    """

    def __init__(self, console: Console = standard_error) -> None:
        self._console = console
        self._live: Live | None = None
        self._facts: dict[str, Any] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=_SPEED_STEPS)
        self._last_validation = ""
        self._layers: dict[str, Any] = {}  # the newest metrics of experts by layer
        self._printed = 0.0
        self._tables_shown: Table | Group | None = None  # of the newest step
        self._phase, self._phase_line_due = "", 0.0
        self._spinner = Spinner("line")  # ASCII

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        resumed = f", resumed after step {facts['first_step']:,}" if facts["first_step"] else ""
        processes = f"{facts['processes']} processes, each on " if facts["processes"] > 1 else ""
        total, used, flops, tokens = (
            format_quantity(facts[key]) for key in ("parameters", "active_parameters", "flops_per_token", "tokens")
        )
        active = f" ({used} active per token, {flops} FLOPs)" if used != total else ""
        if facts.get("mtp_parameters"):
            active += f" and {format_quantity(facts['mtp_parameters'])} of multi-token prediction"
        self._log(
            f"[bold]{escape(facts['run'])}[/]: {total} parameters{active} on "
            f"{processes}{facts['device']}, {facts['dtype']}{resumed}"
        )
        growing = f"{facts['first_batch_tokens']:,} to " if facts["first_batch_tokens"] < facts["batch_tokens"] else ""
        what = f"of {escape(facts['data'])}"
        if not facts.get("sources"):
            what = f"({_epochs(facts['epochs'])} {what})"
        self._log(
            f"{tokens} tokens {what} in "
            f"{facts['steps']:,} steps of {growing}{facts['batch_tokens']:,}: "
            f"{facts['accumulation']} x {facts['micro_batch']} sequences{' per process' if processes else ''}"
        )
        for part in facts.get("sources") or ():
            self._log(f"{escape(part['name'])}: {describe_source(part)}")
        if facts.get("teacher"):
            self._log(f"teacher: {escape(facts['teacher'])}")

    def initial(self, metrics: dict[str, Any]) -> None:
        self._last_validation = f"{metrics['val_loss']:.4f}"
        self._log(f"before the first step  {_validation(metrics)}")

    def step(self, metrics: dict[str, Any]) -> None:
        self._recent.append((metrics["tokens"], metrics["seconds"]))
        if "moe/violation" in metrics and metrics["step"] == self._facts["first_step"] + 1:
            self._log(f"[dim]{_EXPERT_LEGEND}[/]")
        if "moe/load" in metrics:
            self._layers = {key: value for key, value in metrics.items() if key.startswith("moe/")}
        at = f"step {metrics['step']:>6,}"
        if "val_loss" in metrics:
            self._last_validation = f"{metrics['val_loss']:.4f}"
            self._log(f"{at}  loss {metrics['loss']:.4f}  {_validation(metrics)}")
            losses = [(key.removeprefix("val_loss/"), metrics[key]) for key in metrics if key.startswith("val_loss/")]
            if losses:
                self._log(f"{at}  validation of {'  '.join(f'{escape(name)} {value:.4f}' for name, value in losses)}")
        if scores := {key.removeprefix("eval/"): value for key, value in metrics.items() if key.startswith("eval/")}:
            parts = "  ".join(f"{escape(key)} {value:.4f}" for key, value in scores.items())
            self._log(f"{at}  [bold]{parts}[/]")
        if self._is_live():
            self._tables_shown = self._tables(metrics)
            self._draw()
        elif self._line_is_due(metrics):
            self._printed = time.monotonic()
            cells = self._cells(metrics) + self._source_cells(metrics) + self._expert_cells(metrics)
            self._log("  ".join(f"{key} {value}" for key, value in cells))

    def sample(self, step: int, prompt: str, text: str) -> None:
        prompt, text = (escape(_CONTROL.sub("�", part)) for part in (prompt, text))
        self._log(f"[dim]sample:[/] [italic]{prompt}[/]{text}")

    def checkpoint(self, path: Path) -> None:
        self._log(f"[dim]saved {escape(str(path))}[/]")

    def phase(self, name: str, share: float | None = None) -> None:
        """Show what runs and how much of it is done; a plain log gets lines only if it takes long."""
        text = name if share is None else f"{name} {share:.0%}"
        if self._is_live():
            self._phase = name
            self._spinner.update(text=Text(text, "dim", no_wrap=True, overflow="crop"))
            if name or self._live is not None:
                self._draw()
            return
        now = time.monotonic()
        if name != self._phase:
            self._phase, self._phase_line_due = name, now + _PLAIN_SECONDS[0]
        elif name and now >= self._phase_line_due:
            self._phase_line_due = now + _PLAIN_SECONDS[1]
            self._log(f"[dim]{escape(text)}[/]")

    def note(self, message: str) -> None:
        self._log(f"[yellow]Note:[/] {escape(_CONTROL.sub('�', message))}")

    def _log(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, emoji=False)

    def _draw(self) -> None:
        """Update the live lines; the display's thread draws them four times a second."""
        if self._live is None:  # not in `start`: a tracker may ask for a password there
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        parts = (self._tables_shown, self._spinner if self._phase else None)
        self._live.update(Group(*(part for part in parts if part is not None)))

    def _is_live(self) -> bool:
        console = self._console
        return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()

    def _line_is_due(self, metrics: dict[str, Any]) -> bool:
        pause = min(_PLAIN_SECONDS[0] + metrics["seconds"] / 60, _PLAIN_SECONDS[1])
        first_or_last = metrics["step"] in (self._facts["first_step"] + 1, self._facts["steps"])
        return first_or_last or time.monotonic() - self._printed >= pause

    def _speed(self, metrics: dict[str, Any]) -> float:
        """Return tokens per second over the last steps."""
        (first_tokens, first_seconds), (tokens, seconds) = self._recent[0], self._recent[-1]
        if len(self._recent) == 1:
            return float(metrics["tokens_per_second"])
        return (tokens - first_tokens) / max(seconds - first_seconds, 1e-9)

    def _cells(self, metrics: dict[str, Any]) -> list[tuple[str, str]]:
        speed = self._speed(metrics)
        left = self._facts["tokens"] - metrics["tokens"]
        cells = [
            ("step", f"{metrics['step']:,}/{self._facts['steps']:,}"),
            ("loss", f"{metrics['loss']:.4f}" + (" spike" if "spike" in metrics else "")),
            *([("MTP loss", f"{metrics['mtp_loss']:.4f}")] if "mtp_loss" in metrics else []),
            ("validation", self._last_validation or "-"),
            *([("divergence", f"{metrics['kl_loss']:.4f}")] if "kl_loss" in metrics else []),
            ("lr", f"{metrics['lr']:.2e}"),
            ("grad norm", f"{metrics['grad_norm']:.2f}"),
            ("tokens/s", f"{speed:,.0f}"),
            ("data wait", f"{metrics['data_seconds'] / max(metrics['step_seconds'], 1e-9):.0%}"),
        ]
        if "mfu" in metrics:
            cells.append(("MFU", f"{metrics['mfu']:.1%}"))
        if "memory" in metrics:
            cells.append(("memory", f"{metrics['memory'] / 2**30:.2f} GiB"))
        return [*cells, ("elapsed", _clock(metrics["seconds"])), ("left", _clock(left / speed) if speed else "-")]

    def _source_cells(self, metrics: dict[str, Any]) -> list[tuple[str, str]]:
        """Return the tokens and epochs of each source of a mixture so far."""
        parts = [(part, metrics[f"tokens/{part['name']}"]) for part in self._facts.get("sources") or ()]
        return [
            (escape(part["name"]), f"{format_quantity(tokens)} ({_epochs(tokens / part['train_tokens'])})")
            for part, tokens in parts
        ]

    def _expert_cells(self, metrics: dict[str, Any]) -> list[tuple[str, str]]:
        """Return the cells on the balance of experts, none for a dense model."""
        newest = self._layers | metrics
        return [(name, f"{newest[key]:{spec}}") for name, key, spec in _EXPERT_CELLS if key in newest]

    def _tables(self, metrics: dict[str, Any]) -> Table | Group:
        """Return the live line, one for a mixture of sources, and one for a mixture of experts."""
        tables = [self._table(self._cells(metrics), _LEAST_IMPORTANT)]
        if sources := self._source_cells(metrics):
            tables.append(self._table(sources, tuple(name for name, _ in reversed(sources))))
        if not (cells := self._expert_cells(metrics)):
            return tables[0] if len(tables) == 1 else Group(*tables)
        if "moe/layer_violation" in self._layers and "utf" in self._console.encoding.lower():
            top = len(_LEVELS) - 1
            bars = (_LEVELS[min(int(value * len(_LEVELS)), top)] for value in self._layers["moe/layer_violation"])
            cells.append(("by layer", "".join(bars)))
        return Group(*tables, self._table(cells, _LEAST_IMPORTANT_OF_EXPERTS))

    def _table(self, cells: list[tuple[str, str]], least_important: tuple[str, ...]) -> Table:
        for key in least_important:
            if sum(max(len(name), len(value)) + 2 for name, value in cells) - 2 > self._console.width:
                cells = [cell for cell in cells if cell[0] != key]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for key, _ in cells:
            table.add_column(key, justify="right", no_wrap=True)
        table.add_row(*(value for _, value in cells))
        return table
