"""Accuracy that counts a tie as half, for pairs of sentences (the group `blimp_ties`)."""

from collections.abc import Mapping, Sequence
from typing import Any


def score_pair(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the metrics of a pair, whose first sentence is the right one.

    lm-eval's `acc` takes the first of equally likely sentences, so a model that cannot tell any pair apart is always
    right. `acc_ties` gives it the 0.5 of guessing.
    """
    (good, _), (bad, _) = results
    return {"acc": float(good >= bad), "acc_ties": (1.0 + (good > bad) - (good < bad)) / 2}
