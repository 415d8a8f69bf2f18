"""What `lightlm train` shows: a live line and a log in a terminal, plain lines elsewhere."""

import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from lightlm.cli.console import console
from lightlm.quantities import format_quantity

_PLAIN_SECONDS = 10.0  # between plain log lines
_SPEED_STEPS = 20  # steps that the shown speed averages over


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class TrainingDisplay:
    """An `Observer` that draws on standard error."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._facts: dict[str, Any] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=_SPEED_STEPS)
        self._last_validation = ""
        self._printed = 0.0

    def __enter__(self) -> "TrainingDisplay":
        if console.is_terminal:
            self._live = Live(console=console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        resumed = f", resumed after step {facts['first_step']:,}" if facts["first_step"] else ""
        processes = f"{facts['processes']} processes, each on " if facts["processes"] > 1 else ""
        console.print(
            f"[bold]{escape(facts['run'])}[/]: {format_quantity(facts['parameters'])} parameters on "
            f"{processes}{facts['device']}, {facts['dtype']}{resumed}"
        )
        console.print(
            f"{format_quantity(facts['tokens'])} tokens ({facts['epochs']:.2g} epochs of {escape(facts['data'])}) in "
            f"{facts['steps']:,} steps of {facts['batch_tokens']:,}: "
            f"{facts['accumulation']} x {facts['micro_batch']} sequences{' a process' if processes else ''}"
        )

    def step(self, metrics: dict[str, Any]) -> None:
        self._recent.append((metrics["tokens"], metrics["seconds"]))
        if "val_loss" in metrics:
            self._last_validation = f"{metrics['val_loss']:.4f}"
            self._log(
                f"step {metrics['step']:>6,}  loss {metrics['loss']:.4f}  "
                f"[bold]validation {metrics['val_loss']:.4f} ({metrics['val_bpb']:.4f} bits a byte)[/]"
            )
        if self._live is not None:
            self._live.update(self._table(metrics))
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS or metrics["step"] in (1, self._facts["steps"]):
            self._printed = time.monotonic()
            self._log("  ".join(f"{key} {value}" for key, value in self._cells(metrics)))

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._log(f"[dim]sample:[/] [italic]{escape(prompt)}[/]{escape(text)}")

    def checkpoint(self, path: Path) -> None:
        self._log(f"[dim]saved {escape(str(path))}[/]")

    def note(self, message: str) -> None:
        console.print(f"[yellow]Note:[/] {escape(message)}")

    def _log(self, line: str) -> None:
        console.print(line, soft_wrap=True)

    def _speed(self) -> float:
        """Tokens a second over the last steps."""
        (first_tokens, first_seconds), (tokens, seconds) = self._recent[0], self._recent[-1]
        if len(self._recent) == 1:
            return tokens / max(seconds, 1e-9) if not self._facts["first_step"] else 0.0
        return (tokens - first_tokens) / max(seconds - first_seconds, 1e-9)

    def _cells(self, metrics: dict[str, Any]) -> list[tuple[str, str]]:
        speed = self._speed()
        left = self._facts["tokens"] - metrics["tokens"]
        cells = [
            ("step", f"{metrics['step']:,}/{self._facts['steps']:,}"),
            ("loss", f"{metrics['loss']:.4f}"),
            ("validation", self._last_validation or "-"),
            ("lr", f"{metrics['lr']:.2e}"),
            ("grad norm", f"{metrics['grad_norm']:.2f}"),
            ("tokens/s", f"{speed:,.0f}"),
        ]
        if "mfu" in metrics:
            cells.append(("MFU", f"{metrics['mfu']:.1%}"))
        return [*cells, ("elapsed", _clock(metrics["seconds"])), ("left", _clock(left / speed) if speed else "-")]

    def _table(self, metrics: dict[str, Any]) -> Table:
        cells = self._cells(metrics)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for key, _ in cells:
            table.add_column(key, justify="right")
        table.add_row(*(value for _, value in cells))
        return table
