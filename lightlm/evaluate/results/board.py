"""The index of the Open SLM Leaderboard, from the scores of its tasks.

Protocol of huggingface.co/spaces/AxiomicLabs/Open_SLM_Leaderboard: lm-eval 0.4.12 or 0.4.13, zero-shot, float32, all
documents. Each score v counts by its place between guessing and perfection, N(v) = 100 (v - chance) / (1 - chance):

    index      = (N(HellaSwag) + N(mean of ARC-Easy and ARC-Challenge) + N(PIQA) + 0.65 N(ArithMark-3)) / 3.65
    part_index = (N(HellaSwag) + N(mean of ARC-Easy and ARC-Challenge) + N(PIQA)) / 3

The part index is LightLM's, for when the data of ArithMark-3 cannot be read. The board has no figure of that name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightlm.evaluate.settings import Settings

BOARD = "open_slm"
ARITHMARK = "arithmark_3"
INDEX, PART_INDEX = "index", "part_index"
OFF_PROTOCOL = "off-protocol"  # stands in brackets behind the metric
DTYPE = "float32"


@dataclass(frozen=True)
class Part:
    """A task of the board. Args: metric: the score that counts; documents: the number in its test set."""

    metric: str
    chance: float
    weight: float
    documents: int


PARTS = {
    "hellaswag": Part("acc_norm", 0.25, 1.0, 10_042),
    "arc_easy": Part("acc_norm", 0.25, 0.5, 2_376),  # the two share a weight of 1, which is the index of their mean
    "arc_challenge": Part("acc_norm", 0.25, 0.5, 1_172),
    "piqa": Part("acc_norm", 0.5, 1.0, 1_838),
    ARITHMARK: Part("acc_tokens", 0.25, 0.65, 1_000),
}


def metric_of(scores: Mapping[str, float]) -> str | None:
    """Return the name of the figure that these scores by task give; None if more than ArithMark-3 is missing."""
    missing = PARTS.keys() - scores.keys()
    return INDEX if not missing else PART_INDEX if missing == {ARITHMARK} else None


def index(scores: Mapping[str, float]) -> float:
    """Return the index of these scores by task: 0 is guessing, 100 is perfect. Their weights need not be complete."""
    above = {task: 100 * (scores[task] - part.chance) / (1 - part.chance) for task, part in _present(scores).items()}
    return sum(PARTS[task].weight * value for task, value in above.items()) / _total_weight(scores)


def standard_error(scores: Mapping[str, float], documents: Mapping[str, int]) -> float | None:
    """Return the index's standard error from the choice of documents: the binomial errors of the tasks, propagated.

    None if a task has fewer than two documents.
    """
    if min(documents[task] for task in _present(scores)) < 2:
        return None
    total, variance = _total_weight(scores), 0.0
    for task, part in _present(scores).items():
        slope = 100 * part.weight / (1 - part.chance) / total
        variance += slope**2 * scores[task] * (1 - scores[task]) / (documents[task] - 1)
    return math.sqrt(variance)


def _present(scores: Mapping[str, float]) -> dict[str, Part]:
    return {task: part for task, part in PARTS.items() if task in scores}


def _total_weight(scores: Mapping[str, float]) -> float:
    return sum(part.weight for part in _present(scores).values())


def add_index(results: dict[str, Any], dtype: str, settings: Settings) -> list[str]:
    """Add the group `open_slm` with its index to lm-eval's results, if the scores that it needs are there.

    Args:
        dtype: precision of the weights.
        settings: those of prompts; the board's are the defaults.

    Returns:
        What differs from the board's protocol. The figure is then called `index (off-protocol)`.
    """
    found = results["results"]
    scores = {
        task: found[task][f"{part.metric},none"]
        for task, part in PARTS.items()
        if f"{part.metric},none" in found.get(task, ())
    }
    if (metric := metric_of(scores)) is None:
        return []
    counts = {task: results["n-samples"][task]["effective"] for task in scores}
    shots = {results["n-shot"].get(task) or 0 for task in scores}
    others = {task: count for task, count in counts.items() if count != PARTS[task].documents}
    differences = [f"{count:,} of {PARTS[task].documents:,} documents of {task}" for task, count in others.items()]
    if others == counts and len(set(counts.values())) == 1:  # by --limit
        differences = [f"{next(iter(counts.values())):,} documents per task"]
    differences += [f"{max(shots)} example{'s' * (max(shots) != 1)} in the prompt"] if shots != {0} else []
    differences += [f"{dtype} instead of {DTYPE}"] if dtype != DTYPE else []
    differences += [f"--bos {settings.bos}"] if settings.bos != "auto" else []
    differences += ["chat template"] if settings.apply_chat_template else []
    differences += ["system instruction"] if settings.system_instruction is not None else []
    variant = OFF_PROTOCOL if differences else "none"
    error = standard_error(scores, counts)
    entry = {
        "name": BOARD,
        "alias": BOARD,
        f"{metric},{variant}": index(scores),
        f"{metric}_stderr,{variant}": "N/A" if error is None else error,
    }
    results["results"] = {BOARD: entry, **found}
    results["groups"] = {BOARD: entry, **results.get("groups", {})}
    results.setdefault("group_subtasks", {})[BOARD] = list(scores)
    results["versions"][BOARD] = 1.0
    results["n-shot"][BOARD] = max(shots)
    results["higher_is_better"][BOARD] = {metric: True}
    return differences
