"""What a model that knows nothing scores, so that a figure near it is not taken for knowledge."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chance:
    """A level of accuracy, and what reaches it."""

    value: float
    reason: str


_FOUR = Chance(0.25, "one of four answers")
_TWO = Chance(0.5, "one of two answers")
_LEVELS = {
    "hellaswag": _FOUR,
    "arc_easy": Chance(0.25, "one of four answers, of a few questions three or five"),
    "arc_challenge": Chance(0.25, "one of four answers, of a few questions three or five"),
    "openbookqa": _FOUR,
    "sciq": _FOUR,
    "heldout_cloze": _FOUR,
    "piqa": _TWO,
    "winogrande": _TWO,
    # Half the answers by guessing; but small models that always say one word get its share.
    "boolq": Chance(0.6217, "the answer yes to all questions; guessing has 0.5"),
}


def chance_of(task: str) -> Chance | None:
    """The level of a task's accuracies; None where it is not known."""
    if task.startswith("blimp"):
        return _TWO  # a sentence and its ungrammatical twin
    return _LEVELS.get(task)
