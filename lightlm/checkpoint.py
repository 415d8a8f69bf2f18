"""Checkpoint and run folders on disk: what is in them, and how one is found.

    runs/<name>/recipe.yaml metrics.jsonl checkpoints/{step_000100/, latest} eval/ samples/
    step_000100/model.safetensors config.json tokenizer.json [training_state.pt] complete.json

`complete.json` is written last and lists every file's size and xxh3 checksum: a folder without it is not a checkpoint.
"""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightlm import __version__, files
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import CheckpointError
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer

MARKER = "complete.json"
RUNS = Path("runs")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's prefixes


@dataclass
class LoadedModel:
    """A model ready to run, the tokenizer it was trained with, and where both came from."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path

    @property
    def name(self) -> str:
        """The run's name and the step for a checkpoint (`demo/step_000200`), else the folder's name."""
        run = run_of(self.path)
        return f"{run.name}/{self.path.name}" if run else self.path.name


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if (path / MARKER).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def run_of(checkpoint: Path) -> Path | None:
    """The run folder a checkpoint lies in, or None for a folder that stands alone."""
    run = checkpoint.resolve().parent.parent
    return run if checkpoint.resolve().parent.name == "checkpoints" else None


def find_run(reference: str | Path | None = None) -> Path:
    """The folder of a run given by path or by name under `runs/`; None is the newest run (`runs/latest`).

    Raises:
        CheckpointError: there is no such run.
    """
    if reference is None:
        reference = RUNS / "latest"
    for path in (Path(reference), RUNS / reference):
        # A pointer must be read even where it is a link: a run called `latest` would come to point to itself.
        if path.name == "latest" and (target := files.follow(path)) is not None and target.is_dir():
            return target
    if Path(reference) == RUNS / "latest":
        raise CheckpointError(
            f"no run yet: {RUNS / 'latest'} does not exist in {Path.cwd()}; "
            "train a model first (`lightlm train recipes/demo.yaml`) or name a model folder"
        )
    for path in (Path(reference), RUNS / reference):
        if (path / "recipe.yaml").is_file():
            return path
    raise CheckpointError(f"no run at {reference}: it holds no recipe.yaml; runs here: {run_names()}")


def run_names() -> str:
    """The names of the runs in this folder, for messages."""
    return (
        ", ".join(sorted(path.parent.name for path in RUNS.glob("*/recipe.yaml") if path.parent.name != "latest"))
        or "none"
    )


def mark_latest(run: Path) -> None:
    """Let `runs/latest` point to this run, if it lies in `runs`."""
    if run.resolve().parent == RUNS.resolve():
        files.point_to(RUNS / "latest", run.resolve().name)


def newest_checkpoint(run: Path) -> Path:
    """The run's last complete checkpoint.

    Raises:
        CheckpointError: it has none.
    """
    found = checkpoints(run)
    if not found:
        raise CheckpointError(
            f"no checkpoint yet in {run}: nothing complete under {run / 'checkpoints'}; "
            "let the run reach its first checkpoint, or choose another run"
        )
    return found[-1]


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is, or set out to be, a checkpoint of LightLM's own format."""
    return (folder / "config.json").is_file() and _read_config(folder).get("model_type") == "lightlm"


def write_checkpoint(
    run: Path, step: int, model: Transformer, tokenizer: Tokenizer, training_state: dict[str, Any] | None = None
) -> Path:
    """Write `checkpoints/step_...` of a run and let `latest` point to it; returns its path."""
    path = run / "checkpoints" / step_name(step)
    save_model(path, model, tokenizer, training_state, overwrite=True)
    files.point_to(path.parent / "latest", path.name)
    return path


def save_model(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    training_state: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
    """
    with files.new_folder(path, overwrite=overwrite) as folder:
        save_file(clean_state(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
        config = {
            "model_type": "lightlm",
            "lightlm_version": __version__,
            "end_of_text_id": tokenizer.end_of_text_id,
            "model": model.config.to_dict(),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(folder / "tokenizer.json")
        if training_state is not None:
            torch.save(training_state, folder / "training_state.pt")
        listing = {
            file.name: {"bytes": file.stat().st_size, "xxh3": files.checksum(file)} for file in sorted(folder.iterdir())
        }
        (folder / MARKER).write_text(json.dumps({"files": listing}, indent=2) + "\n", encoding="utf-8")


def clean_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU under the names of a plain `Transformer`, whatever wraps the model."""
    cleaned = {}
    for name, tensor in state.items():
        parts = [part for part in re.split(r"(?<=\.)", name) if part not in _WRAPPERS]
        cleaned["".join(parts)] = tensor.detach().cpu().contiguous()
    return cleaned


def check(folder: Path) -> None:
    """Verify a checkpoint against its marker: present, every file there, sizes and checksums right.

    Raises:
        CheckpointError: naming the first file that does not fit.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: there is no such folder")
    if not (folder / MARKER).is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: its marker {MARKER} is missing, so writing it was interrupted; "
            "use another checkpoint of the run, or delete this folder"
        )
    advice = "use another checkpoint; to resume the run from the one before, delete this folder"
    try:
        listing = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / MARKER} is damaged: it is no list of files; {advice}") from None
    for name, expected in listing.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{folder / name} is damaged: {MARKER} lists {expected['bytes']} bytes, "
                f"{'the file is missing' if size is None else f'it has {size}'}; {advice}"
            )
        if files.checksum(folder / name) != expected["xxh3"]:
            raise CheckpointError(f"{folder / name} is damaged: its checksum is not the one in {MARKER}; {advice}")


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a checkpoint folder of LightLM's own format, checked against its marker, in evaluation mode.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or its parts do not fit each other.
    """
    check(folder)
    config = _read_config(folder)
    values = config["model"]
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(set(values) - known):
        raise CheckpointError(
            f"{folder / 'config.json'} has the unknown keys {', '.join(unknown)}; "
            f"it was written by another version of LightLM (this is {__version__})"
        )
    # A tokenizer.json does not say which token ends a text; SmolLM2-Instruct's is not <|endoftext|>, for example.
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", end_of_text_id=config["end_of_text_id"])
    try:
        state = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} cannot be read: {error}") from None
    model = build_model(ModelConfig(**values), state, str(folder))
    return LoadedModel(model.to(device=device, dtype=dtype).eval(), tokenizer, folder)


def build_model(config: ModelConfig, state: dict[str, Tensor], where: str) -> Transformer:
    """A model of this shape that takes over exactly these weights, in their precision.

    Raises:
        CheckpointError: a weight is missing, left over, or of the wrong shape; all are listed.
    """
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != given:
        wrong = [f"{name} is missing" for name in sorted(wanted.keys() - given.keys())]
        wrong += [f"{name} belongs to no part of the model" for name in sorted(given.keys() - wanted.keys())]
        wrong += [
            f"{name} has shape {given[name]}, the model needs {wanted[name]}"
            for name in sorted(wanted.keys() & given.keys())
            if wanted[name] != given[name]
        ]
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"the weights of {where} do not fit its configuration: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(state, assign=True)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is no JSON object")
    return config
