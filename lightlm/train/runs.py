"""Run folders: a new one for a recipe, or an earlier one to go on with."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightlm import checkpoint, files
from lightlm.errors import CheckpointError, RecipeError, UsageError
from lightlm.recipe import NAME_PATTERN, Recipe, load_run_recipe
from lightlm.train.checkpointing.state import check_resumable
from lightlm.train.distributed import Launch

# What a resumed run may not change: its weights, its data, its batches or its optimizer's state would no longer be
# those it began with.
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
_LAUNCH = "launch.json"  # which launch a run was last started by


def new_run(name: str, *, exact: bool, launch: Launch | None = None) -> Path:
    """Create `runs/<name>`.

    Args:
        exact: refuse a name that is taken; otherwise -2, -3, ... is added to it.
        launch: remembered in the folder, so that the launch finds it again when it restarts its processes.

    Raises:
        UsageError: the name is no plain folder name.
        CheckpointError: the name is taken.
    """
    if not re.fullmatch(NAME_PATTERN, name) or name == "latest":
        raise UsageError(f"'{name}' cannot name a run: use letters, digits, '.', '_' and '-', and not 'latest'")
    path, number = checkpoint.RUNS / name, 1
    while path.exists() and not _is_abandoned(path):
        if exact:
            raise CheckpointError(
                f"{path} exists already; go on with `lightlm train --resume {path}`, or choose another --name"
            )
        number += 1
        path = checkpoint.RUNS / f"{name}-{number}"
    if _is_abandoned(path):
        files.remove_folder(path)
    # Whole or not at all: a kill leaves no run that its launch would not know again.
    with files.new_folder(path) as folder:
        if launch is not None:
            _remember(launch, folder)
    return path


def _is_abandoned(path: Path) -> bool:
    """A run killed before its recipe was there left nothing to resume, at most a temporary file: its name is free."""
    return path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir())


def claim_run(run: Path, launch: Launch) -> None:
    """Make this run the one that `launch` finds again after a restart."""
    _remember(launch, run)


def run_before_restart(launch: Launch | None) -> Path | None:
    """The run that this launch was at when its processes were restarted, if they are and it had got that far."""
    if launch is None or not launch.restarts:
        return None
    found = [path for path in checkpoint.RUNS.glob(f"*/{_LAUNCH}") if launch.made(_read(path))]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    # `latest` leads to a run too, by a name that moves.
    return checkpoint.RUNS / newest.parent.resolve().name if newest else None


def _remember(launch: Launch, folder: Path) -> None:
    # Identifiers come again: process ids, and names given to --rdzv-id. An older run must not pass for this launch's.
    for older in checkpoint.RUNS.glob(f"*/{_LAUNCH}"):
        if launch.made(_read(older)):
            older.unlink(missing_ok=True)
    record = {"id": launch.id, "host": launch.host, "agent": launch.agent}
    files.write_text(folder / _LAUNCH, json.dumps(record) + "\n")


def _read(record: Path) -> dict[str, Any]:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # another run's, deleted or moved in this moment
        return {}


def reopen_run(
    reference: str | None, overrides: Sequence[str], warn: Callable[[str], None] = checkpoint.warn
) -> tuple[Recipe, Path, Path | None]:
    """The recipe, the folder and the newest checkpoint of a run to resume; no checkpoint means from the start.

    Reads all of the checkpoint, so of several processes one should call this. A damaged one is passed over, and stays
    where it is until the run goes on (`saving.tidy`).

    Args:
        warn: told of a damaged checkpoint and of the one that is used instead.

    Raises:
        CheckpointError: no such run, or all its checkpoints are damaged.
        RecipeError: an override changes what a run must keep.
    """
    run = checkpoint.find_run(reference)
    path = run / "recipe.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run} cannot be resumed: it holds no recipe.yaml")
    before, recipe = load_run_recipe(run).to_dict(), load_run_recipe(run, overrides)
    if differing := [key for key in _FIXED if _lookup(before, key) != _lookup(recipe.to_dict(), key)]:
        raise RecipeError(f"{', '.join(differing)} cannot change in a resumed run ({run}); start a new run instead")
    if not checkpoint.checkpoints(run):
        return recipe, run, None
    return recipe, run, checkpoint.newest_checkpoint(run, check_resumable, warn)


def _lookup(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None for a setting that has no effect in this recipe and so is not written."""
    section, _, name = key.partition(".")
    return values[section].get(name) if name else values[section]
