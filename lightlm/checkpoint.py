"""Checkpoint and run folders on disk: what is in them, and how one is found.

    runs/<name>/recipe.yaml metrics.jsonl checkpoints/{step_000100/, latest} eval/ samples/
    step_000100/model.safetensors config.json tokenizer.json [training_state.pt] complete.json

`complete.json` is written last and lists every file's size and xxh3 checksum: a folder without it is not a checkpoint.
"""

import json
import logging
import re
from collections.abc import Callable, Collection
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
from lightlm.model.config import RENAMED_FIELDS, ModelConfig
from lightlm.model.transformer import Transformer

MARKER = "complete.json"
TRAINING_STATE = "training_state.pt"
RUNS = Path("runs")
_MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
warn = logging.getLogger("lightlm").warning  # to standard error, unless a program says otherwise
_STEP_NAME = re.compile(r"step_(\d+)")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's prefixes


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written: torn, altered or unreadable. `problem` says what, without advice."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; use another checkpoint, or name the run: it falls back on the one before")
        self.problem = problem


@dataclass
class LoadedModel:
    """A model ready to run, the tokenizer it was trained with, and where both came from."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path
    weights: tuple[Path, ...] = ()  # the files that they were read from

    @property
    def name(self) -> str:
        """See `model_name`."""
        return model_name(self.path)


def model_name(path: Path) -> str:
    """The run's name and the step for a checkpoint (`demo/step_000200`), else the folder's name."""
    run = run_of(path)
    return f"{run.name}/{path.name}" if run else path.name


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    named = {path: _STEP_NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step_*")}
    steps = {path: int(match[1]) for path, match in named.items() if match and (path / MARKER).is_file()}
    return sorted(steps, key=steps.__getitem__)


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


def newest_checkpoint(
    run: Path,
    examine: Callable[[Path], None] | None = None,
    warn: Callable[[str], None] = warn,
) -> Path:
    """The run's last complete checkpoint that is whole.

    Args:
        examine: raises DamagedCheckpointError for one that is not; by default `check` of the model's files.
        warn: told of each damaged one and what is used instead.

    Raises:
        CheckpointError: it has none, or all are damaged.
    """
    examine = examine or check_model
    problems: list[str] = []
    for path in reversed(checkpoints(run)):
        try:
            examine(path)
        except DamagedCheckpointError as error:
            problems.append(error.problem)
            continue
        for problem in problems:
            warn(f"{problem}; {path.name} is used instead")
        return path
    if problems:
        raise CheckpointError(
            f"all {len(problems)} checkpoints of {run} are damaged ({'; '.join(problems)}); "
            f"to begin the run again with `lightlm train --resume {run}`, delete {run / 'checkpoints'}"
        )
    raise CheckpointError(
        f"no checkpoint yet in {run}: nothing complete under {run / 'checkpoints'}; "
        "let the run reach its first checkpoint, or choose another run"
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is, or set out to be, a checkpoint of LightLM's own format."""
    return (folder / "config.json").is_file() and _read_config(folder).get("model_type") == "lightlm"


def write_checkpoint(
    run: Path, step: int, model: Transformer, tokenizer: Tokenizer, training_state: dict[str, Any] | None = None
) -> Path:
    """Write `checkpoints/step_...` of a run and let `latest` point to it; returns its path."""
    return write_states(run, step, model.state_dict(), model.config, tokenizer, training_state)


def write_states(
    run: Path,
    step: int,
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    training_state: dict[str, Any] | None = None,
    *,
    milestone: bool = False,
) -> Path:
    """`write_checkpoint` of weights that no model holds: a copy taken earlier, or gathered from several devices.

    Args:
        milestone: noted in the marker; see `is_milestone`.
    """
    path = run / "checkpoints" / step_name(step)
    with files.new_folder(path, overwrite=True) as folder:
        _fill(folder, weights, config, tokenizer, training_state, {"milestone": True} if milestone else {})
    files.point_to(path.parent / "latest", path.name)
    return path


def is_milestone(checkpoint: Path) -> bool:
    """Whether a complete checkpoint is to be kept for good."""
    try:
        return bool(json.loads((checkpoint / MARKER).read_text(encoding="utf-8")).get("milestone"))
    except (ValueError, AttributeError):
        return False


def save_model(path: Path, model: Transformer, tokenizer: Tokenizer, *, overwrite: bool = False) -> None:
    """Write a checkpoint folder without training state, whole or not at all.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
    """
    with files.new_folder(path, overwrite=overwrite) as folder:
        _fill(folder, model.state_dict(), model.config, tokenizer, None, {})


def _fill(
    folder: Path,
    weights: dict[str, Tensor],
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    training_state: dict[str, Any] | None,
    facts: dict[str, Any],
) -> None:
    """Write a checkpoint's files, and last its marker, which also holds `facts`."""
    save_file(clean_state(weights), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "lightlm",
        "lightlm_version": __version__,
        "end_of_text_id": tokenizer.end_of_text_id,
        "model": model_config.to_dict(),
    }
    if tokenizer.bos_id is not None or tokenizer.adds_bos:  # an imported model's
        config |= {"bos_token_id": tokenizer.bos_id, "adds_bos": tokenizer.adds_bos}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    if training_state is not None:
        torch.save(training_state, folder / TRAINING_STATE)
    listing = {
        file.name: {"bytes": file.stat().st_size, "xxh3": files.checksum(file)} for file in sorted(folder.iterdir())
    }
    (folder / MARKER).write_text(json.dumps(facts | {"files": listing}, indent=2) + "\n", encoding="utf-8")


def clean_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU under the names of a plain `Transformer`, whatever wraps the model."""
    cleaned = {}
    for name, tensor in state.items():
        parts = [part for part in re.split(r"(?<=\.)", name) if part not in _WRAPPERS]
        cleaned["".join(parts)] = tensor.detach().cpu().contiguous()
    return cleaned


def check(folder: Path, names: Collection[str] | None = None) -> None:
    """Verify a checkpoint against its marker: present, files there, sizes and checksums right.

    Args:
        names: look at these files only.

    Raises:
        DamagedCheckpointError: naming the first file that does not fit.
        CheckpointError: it is no complete checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: there is no such folder")
    if not (folder / MARKER).is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: its marker {MARKER} is missing, so writing it was interrupted; "
            "use another checkpoint of the run, or delete this folder"
        )
    listing = _listing(folder)
    if unlisted := [name for name in names or _MODEL_FILES if name not in listing]:
        raise DamagedCheckpointError(f"{folder / MARKER} is damaged: it does not list {unlisted[0]}")
    for name in names or listing:
        size, checksum = listing[name]
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise DamagedCheckpointError(
                f"{folder / name} is damaged: {MARKER} lists {size} bytes, "
                f"{'the file is missing' if found is None else f'it has {found}'}"
            )
        if files.checksum(folder / name) != checksum:
            raise DamagedCheckpointError(f"{folder / name} is damaged: its checksum is not the one in {MARKER}")


def check_model(folder: Path) -> None:
    """`check` what using a model needs, which leaves out the two thirds of a checkpoint that only training reads."""
    check(folder, _MODEL_FILES)


def _listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of each file that a marker lists."""
    try:
        listing = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return {name: (entry["bytes"], entry["xxh3"]) for name, entry in listing.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError(f"{folder / MARKER} is damaged: it is no list of files") from None


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a checkpoint folder of LightLM's own format, checked against its marker, in evaluation mode.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or its parts do not fit each other.
    """
    check_model(folder)
    config = _read_config(folder)
    values = {RENAMED_FIELDS.get(key, key): value for key, value in config["model"].items()}
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(set(values) - known):
        raise CheckpointError(
            f"{folder / 'config.json'} has the unknown keys {', '.join(unknown)}; "
            f"it was written by another version of LightLM (this is {__version__})"
        )
    # A tokenizer.json does not say which token ends a text; SmolLM2-Instruct's is not <|endoftext|>, for example.
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", end_of_text_id=config["end_of_text_id"])
    tokenizer.bos_id, tokenizer.adds_bos = config.get("bos_token_id"), config.get("adds_bos", False)
    try:
        state = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{folder / 'model.safetensors'} cannot be read: {error}") from None
    model = build_model(ModelConfig(**values), state, str(folder))
    model = model.to(device=device, dtype=dtype).eval()
    return LoadedModel(model, tokenizer, folder, (folder / "model.safetensors",))


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
