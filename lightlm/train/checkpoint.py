"""The training state beside a checkpoint's weights: what a resumed run needs to go on bit for bit."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightlm import checkpoint, files
from lightlm.errors import CheckpointError


@dataclass
class Progress:
    """How far a run has come. Batches and learning rates are functions of these counts."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # the loader's whole state
    seconds: float = 0.0  # spent training, over all interruptions


def pack(progress: Progress, optimizer: dict[str, Any]) -> dict[str, Any]:
    return {"progress": asdict(progress), "optimizer": optimizer, "rng": torch.get_rng_state()}


def unpack(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """Progress and optimizer state of a checkpoint; restores torch's random generator.

    Raises:
        CheckpointError: the checkpoint holds weights only.
    """
    path = folder / "training_state.pt"
    if not path.is_file():
        raise CheckpointError(f"{folder} cannot be resumed: {path.name} is missing, it holds weights only")
    state = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["rng"])
    return Progress(**state["progress"]), state["optimizer"]


def prune(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` complete checkpoints."""
    for path in checkpoint.checkpoints(run)[:-keep_last]:
        files.remove_folder(path)
