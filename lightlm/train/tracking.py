"""What a run reports while it goes: the metrics file, and the interface of whoever watches."""

import json
import os
from pathlib import Path
from typing import Any, Protocol

from lightlm import files


class Observer(Protocol):
    """Receives a run's events; the command line's live display is one."""

    def start(self, facts: dict[str, Any]) -> None:
        """The run begins: its name, sizes, device and where it starts from."""

    def step(self, metrics: dict[str, Any]) -> None:
        """A step is done; `metrics` is the object that also went to metrics.jsonl."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """The model continued `prompt` with `text`."""

    def checkpoint(self, path: Path) -> None:
        """A checkpoint is complete."""

    def note(self, message: str) -> None:
        """Something the user should know, such as a setting with no effect."""


class Silent:
    """The observer of the processes that do not write."""

    def start(self, facts: dict[str, Any]) -> None: ...
    def step(self, metrics: dict[str, Any]) -> None: ...
    def sample(self, step: int, prompt: str, text: str) -> None: ...
    def checkpoint(self, path: Path) -> None: ...
    def note(self, message: str) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, appended as the run goes."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open for appending after `last_step`; later steps, which an interrupted run did not save, are dropped."""
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                # A kill can leave half a line at the end.
                if line.endswith("}") and json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
        files.write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All steps of a run so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
