"""Resuming a run: its training state beside a checkpoint's weights, and its recipe, folder and newest checkpoint.

The training state lets a resumed run repeat an uninterrupted one exactly.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from lightlm import checkpoint
from lightlm.data.folder import DataFolder
from lightlm.errors import CheckpointError, DataError, RecipeError
from lightlm.recipe import Recipe, load_run_recipe
from lightlm.runs import find_run
from lightlm.train.observe.spikes import SpikeHistory
from lightlm.train.step.scaling import ScaleState

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


@dataclass
class Progress:
    """Counts of a run so far; batches and learning rates are functions of them."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # the loader's whole state
    seconds: float = 0.0  # of training, without interruptions
    spikes: SpikeHistory = field(default_factory=SpikeHistory)  # empty in older checkpoints
    loss_scale: ScaleState = field(default_factory=ScaleState)  # likewise; see train/step/scaling.py


def data_identity(data: DataFolder) -> str:
    """Return a hash of the checksums of tokenizer and shards; folders with the same one give the same batches."""
    parts = [data.manifest.tokenizer_sha256, *(f"{shard.file} {shard.xxh3}" for shard in data.manifest.shards)]
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())


def pack(progress: Progress, optimizer: dict[str, Any], data: DataFolder) -> dict[str, Any]:
    return {
        "progress": asdict(progress),
        "optimizer": optimizer,
        "rng": torch.get_rng_state(),
        "data": data_identity(data),
    }


def unpack(folder: Path, data: DataFolder) -> tuple[Progress, dict[str, Any]]:
    """Return a checkpoint's progress and optimizer state, and restore torch's random generator.

    Raises:
        CheckpointError: the checkpoint holds only weights, or its state cannot be read.
        DataError: `data` is not the run's data.
    """
    checkpoint.check(folder, [checkpoint.TRAINING_STATE])
    state = _read(folder)
    if state["data"] != data_identity(data):
        raise DataError(
            f"{data.path} is not the data that {folder} was trained on: its tokenizer or shards have changed since; "
            "restore the old folder, or start a new run"
        )
    torch.set_rng_state(state["rng"])
    progress = dict(state["progress"])
    spikes = SpikeHistory(**progress.pop("spikes", {}))
    scale = ScaleState(**progress.pop("loss_scale", {}))
    return Progress(**progress, spikes=spikes, loss_scale=scale), state["optimizer"]


def check_resumable(folder: Path) -> None:
    """Verify that a checkpoint is undamaged and that its training state can be read.

    Raises:
        DamagedCheckpointError: it is damaged.
        CheckpointError: it holds only weights.
    """
    checkpoint.check(folder)
    _read(folder, mmap=True)  # mmap: leave out the tensors, whose checksum was just verified


def _read(folder: Path, *, mmap: bool = False) -> dict[str, Any]:
    path = folder / checkpoint.TRAINING_STATE
    if not path.is_file():
        raise CheckpointError(f"{folder} cannot be resumed: {path.name} is missing; it holds only weights")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise checkpoint.DamagedCheckpointError(f"{path} cannot be read: {error}") from None
    return state


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
    saved = checkpoint.newest_checkpoint(run, check_resumable, warn) if checkpoint.checkpoints(run) else None
    return recipe, run, saved


def _lookup(values: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or None for a setting without effect, which the recipe leaves out."""
    section, _, name = key.partition(".")
    return values[section].get(name) if name else values[section]
