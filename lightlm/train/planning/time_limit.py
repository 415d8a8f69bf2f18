"""A limit of time for a run: the tokens that this machine can train on within it."""

import time
from dataclasses import dataclass

from lightlm.data.training_data import TrainingData
from lightlm.recipe import Recipe
from lightlm.train.fitting import fit_recipe
from lightlm.train.planning.plan import run_seconds, run_sizes
from lightlm.train.planning.probe import Probe, run_probe

# Share of the limit left to what a probe does not measure: samples, checkpoints, and a machine whose speed varies.
_RESERVE = 0.1


@dataclass(frozen=True)
class Fit:
    """What a limit allows.

    Attributes:
        tokens: whole batches, at least one; `train.tokens` of the recipe if all fit.
        seconds: time of the whole recipe, validations included.
        tokens_per_second: speed of training.
        spent: seconds of the limit that were gone when the steps had been timed.
    """

    tokens: int
    seconds: float
    tokens_per_second: float
    spent: float


def fit_time(recipe: Recipe, data: TrainingData, minutes: float, began: float | None = None) -> Fit:
    """Run a few steps of the recipe in a process of their own, and return how much of it fits into the limit.

    Args:
        began: when the limit began, on `time.monotonic`'s clock, so that the start and these steps count; None is
            after them.

    Raises:
        ProbeError: the steps failed or do not fit into memory.
    """
    recipe = fit_recipe(recipe, data, lambda message: None)
    probe = run_probe(recipe)
    return fit_probe(probe, recipe, data, minutes, 0.0 if began is None else time.monotonic() - began)


def fit_probe(probe: Probe, recipe: Recipe, data: TrainingData, minutes: float, spent: float = 0.0) -> Fit:
    """Return how much of the recipe fits into the limit less the seconds spent, at the speed of this probe."""

    def seconds(tokens: int) -> float:
        shorter = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": tokens})})
        return run_seconds(probe, shorter, run_sizes(shorter, data))

    whole, batch = recipe.train.tokens, recipe.batch_sequences * recipe.seq_len
    total, limit = seconds(whole), 60 * minutes - spent
    sizes = run_sizes(recipe, data)
    rate = sizes["tokens"] / probe.training_seconds(recipe, sizes["tokens"], sizes["steps"])
    if total <= limit:
        return Fit(whole, total, rate, spent)
    fits, exceeds = 1, -(-whole // batch)  # batches
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if seconds(middle * batch) <= (1 - _RESERVE) * limit:
            fits = middle
        else:
            exceeds = middle
    return Fit(fits * batch, total, rate, spent)
