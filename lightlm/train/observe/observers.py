"""`Observer`, the interface of whatever follows a run: the live display, the experiment trackers, or nothing."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Finished = Callable[[float], None]  # receives the finished share of a phase


class Observer:
    """Receives a run's events; this base class ignores them all."""

    def start(self, facts: dict[str, Any]) -> None:
        """Receive the run's name, sizes, device, first step and last logged step (`Trainer.facts`)."""

    def initial(self, metrics: dict[str, Any]) -> None:
        """Receive the validation of the model that a run starts from, as in the row of step 0 of metrics.jsonl."""

    def step(self, metrics: dict[str, Any]) -> None:
        """Receive the metrics of a step, as in metrics.jsonl."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Receive the model's continuation of a prompt."""

    def checkpoint(self, path: Path) -> None:
        """Receive the path of a complete checkpoint."""

    def phase(self, name: str, share: float | None = None) -> None:
        """Receive what the run does between two steps, such as `validating`, and how much of it is done; "" at its end.

        A long phase reports its progress many times.
        """

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[Finished]:
        """Context manager that tells `phase` what the block does, and gives a function for its progress."""
        self.phase(name)
        try:
            yield lambda share: self.phase(name, share)
        finally:
            self.phase("")

    def note(self, message: str) -> None:
        """Receive a message for the user, for example about a setting without effect."""


def _forwarded(event: str) -> Any:
    def forward(self: "Observers", *arguments: Any) -> None:
        for observer in self._observers:
            getattr(observer, event)(*arguments)

    return forward


class Observers(Observer):
    """Forwards each event to several observers, in this order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    start, initial = _forwarded("start"), _forwarded("initial")
    step, sample = _forwarded("step"), _forwarded("sample")
    checkpoint, phase, note = _forwarded("checkpoint"), _forwarded("phase"), _forwarded("note")
