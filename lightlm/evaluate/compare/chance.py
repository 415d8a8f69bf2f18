"""Chance-level accuracy per task, to tell guessing from knowledge."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chance:
    """An accuracy, and the guessing that reaches it."""

    value: float
    reason: str


_FOUR = Chance(0.25, "one of four answers")
_ARC = Chance(0.25, "one of four answers; a few questions have three or five")
_TWO = Chance(0.5, "one of two answers")
_LEVELS = {
    "hellaswag": _FOUR,
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "openbookqa": _FOUR,
    "sciq": _FOUR,
    "heldout_cloze": _FOUR,
    "arithmark_3": _FOUR,
    "piqa": _TWO,
    "winogrande": _TWO,
    # Guessing reaches 0.5, but small models often give the same answer to all questions.
    "boolq": Chance(0.6217, "the answer yes to all questions; guessing reaches 0.5"),
}


def chance_of(task: str) -> Chance | None:
    """Return the chance level of a task's accuracies; None if unknown."""
    return _TWO if task.startswith("blimp") else _LEVELS.get(task)  # BLiMP: a sentence and its ungrammatical twin
