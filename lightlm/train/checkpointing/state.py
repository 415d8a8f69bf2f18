"""The training state beside a checkpoint's weights, with which a resumed run repeats an uninterrupted one exactly."""

import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from lightlm import checkpoint, files
from lightlm.data.shards import DataFolder
from lightlm.errors import CheckpointError, DataError
from lightlm.train.observe.spikes import SpikeHistory


@dataclass
class Progress:
    """Counts of a run so far; batches and learning rates are functions of them."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # the loader's whole state
    seconds: float = 0.0  # of training, without interruptions
    spikes: SpikeHistory = field(default_factory=SpikeHistory)  # empty in older checkpoints


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
    return Progress(**progress, spikes=spikes), state["optimizer"]


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


def prune(run: Path, keep_last: int) -> None:
    """Delete all complete checkpoints except milestones and the newest `keep_last`."""
    for path in checkpoint.checkpoints(run)[:-keep_last]:
        if not checkpoint.is_milestone(path):
            files.remove_folder(path)
