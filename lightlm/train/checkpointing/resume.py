"""Reopening a run to resume it: its recipe, its folder and its newest checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightlm import checkpoint
from lightlm.errors import RecipeError
from lightlm.recipe import Recipe, load_run_recipe
from lightlm.runs import find_run
from lightlm.train.checkpointing.state import check_resumable

# Settings that fix a run's weights, data, batches or optimizer state: a resumed run cannot change them.
_FIXED = (
    "model",
    "data.dataset",
    "train.batch_tokens",
    "train.seq_len",
    "train.seed",
    "optimizer.name",
    "schedule.batch_warmup",
    "schedule.batch_start",
)


def reopen_run(
    reference: str | Path | None, overrides: Sequence[str], warn: Callable[[str], None] = checkpoint.warn
) -> tuple[Recipe, Path, Path | None]:
    """Return a run's recipe, its folder and its newest undamaged checkpoint; without one the run restarts.

    This reads the whole checkpoint, so only one process of a run should call it. A damaged checkpoint stays in place
    until the run trains (`saving.tidy`).

    Args:
        reference: path or name of the run; None is the newest.
        overrides: changes to the run's recipe.
        warn: receives a message for each damaged checkpoint.

    Raises:
        CheckpointError: the run does not exist, or all its checkpoints are damaged.
        RecipeError: an override changes a setting that a resumed run cannot change.
    """
    run = find_run(reference)
    before, recipe = load_run_recipe(run).to_dict(), load_run_recipe(run, overrides)
    if differing := [key for key in _FIXED if _lookup(before, key) != _lookup(recipe.to_dict(), key)]:
        raise RecipeError(f"{', '.join(differing)} cannot change in a resumed run ({run}); start a new run instead")
    if not checkpoint.checkpoints(run):
        return recipe, run, None
    return recipe, run, checkpoint.newest_checkpoint(run, check_resumable, warn)


def _lookup(values: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or None for a setting without effect, which the recipe leaves out."""
    section, _, name = key.partition(".")
    return values[section].get(name) if name else values[section]
