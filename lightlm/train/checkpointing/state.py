"""The training state beside a checkpoint's weights: what a resumed run needs to go on bit for bit."""

import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from lightlm import checkpoint, files
from lightlm.data.folder import DataFolder
from lightlm.errors import CheckpointError, DataError
from lightlm.train.observe.spikes import SpikeHistory


@dataclass
class Progress:
    """How far a run has come. Batches and learning rates are functions of these counts."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # the loader's whole state
    seconds: float = 0.0  # spent training, over all interruptions
    spikes: SpikeHistory = field(default_factory=SpikeHistory)  # empty in checkpoints from before there was one


def data_identity(data: DataFolder) -> str:
    """Two folders with the same identity give the same batches: a hash of the tokenizer's and all shards' checksums."""
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
    """Progress and optimizer state of a checkpoint; restores torch's random generator.

    Raises:
        CheckpointError: the checkpoint holds weights only, or its state cannot be read.
        DataError: `data` is not what the run was trained on.
    """
    checkpoint.check(folder, [checkpoint.TRAINING_STATE])
    state = _read(folder)
    if state["data"] != data_identity(data):
        raise DataError(
            f"{data.path} is not the data that {folder} was trained on: its tokenizer or shards have changed since; "
            "put the old folder back, or start a new run"
        )
    torch.set_rng_state(state["rng"])
    progress = dict(state["progress"])
    spikes = SpikeHistory(**progress.pop("spikes", {}))
    return Progress(**progress, spikes=spikes), state["optimizer"]


def check_resumable(folder: Path) -> None:
    """Whether a checkpoint is whole and its training state can be read.

    Raises:
        DamagedCheckpointError: it is not.
        CheckpointError: it was never one to resume from: it holds weights only.
    """
    checkpoint.check(folder)
    _read(folder, mmap=True)  # without its tensors, which have just been read for their checksum


def _read(folder: Path, *, mmap: bool = False) -> dict[str, Any]:
    path = folder / checkpoint.TRAINING_STATE
    if not path.is_file():
        raise CheckpointError(f"{folder} cannot be resumed: {path.name} is missing, it holds weights only")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise checkpoint.DamagedCheckpointError(f"{path} cannot be read: {error}") from None
    return state


def prune(run: Path, keep_last: int) -> None:
    """Delete all complete checkpoints but the newest `keep_last` and those to be kept for good."""
    for path in checkpoint.checkpoints(run)[:-keep_last]:
        if not checkpoint.is_milestone(path):
            files.remove_folder(path)
