"""What a run reports while it goes: the metrics file, and the interface of whoever watches."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from lightlm import files


class Observer(Protocol):
    """Receives a run's events; the command line's live display is one."""

    def start(self, facts: dict[str, Any]) -> None:
        """The run begins: its name, sizes, device, where it starts from, and the last step logged before."""

    def step(self, metrics: dict[str, Any]) -> None:
        """A step is done; `metrics` is the object that also went to metrics.jsonl."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """The model continued `prompt` with `text`."""

    def checkpoint(self, path: Path) -> None:
        """A checkpoint is complete."""

    def note(self, message: str) -> None:
        """Something the user should know, such as a setting with no effect."""


class Observers:
    """Several observers as one; each event reaches them in this order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def start(self, facts: dict[str, Any]) -> None:
        for observer in self._observers:
            observer.start(facts)

    def step(self, metrics: dict[str, Any]) -> None:
        for observer in self._observers:
            observer.step(metrics)

    def sample(self, step: int, prompt: str, text: str) -> None:
        for observer in self._observers:
            observer.sample(step, prompt, text)

    def checkpoint(self, path: Path) -> None:
        for observer in self._observers:
            observer.checkpoint(path)

    def note(self, message: str) -> None:
        for observer in self._observers:
            observer.note(message)


class Silent:
    """The observer of the processes that do not write."""

    def start(self, facts: dict[str, Any]) -> None: ...
    def step(self, metrics: dict[str, Any]) -> None: ...
    def sample(self, step: int, prompt: str, text: str) -> None: ...
    def checkpoint(self, path: Path) -> None: ...
    def note(self, message: str) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, appended as the run goes.

    `logged_step` is the last step that stood in the file when it was opened, before it was cut; 0 for none.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """Open for appending after `last_step`; later steps, which an interrupted run did not save, are dropped."""
        kept = []
        self.logged_step = 0
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                # A kill can leave half a line at the end.
                if not line.endswith("}"):
                    continue
                self.logged_step = json.loads(line)["step"]
                if self.logged_step <= last_step:
                    kept.append(line + "\n")
        files.write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        # JSON has no NaN or infinity: the loss of a skipped step may be null.
        values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All steps of a run so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
