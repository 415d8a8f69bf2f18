"""The checkpoint folder: its format, and how to write, check and load it.

    checkpoints/step_000100/model.safetensors config.json tokenizer.json
                            [tokenizer_config.json] [generation_config.json]
                            [raw.safetensors] [training_state.pt] complete.json
    checkpoints/latest -> step_000100
    checkpoints/best -> step_000080, with `checkpoint.keep_best`

A model that began with an imported one keeps what its files say about special tokens, its chat template and generation
in tokenizer_config.json and generation_config.json, as transformers names and writes them.

With `train.mtp`, both files of weights also hold the heads of multi-token prediction, under `mtp.`. Only what asks for
them loads them, as a run that resumes.

With `train.ema`, `model.safetensors` is the average of the weights, and `raw.safetensors` the last ones.

`complete.json` is written last and lists every file's size and xxh3 checksum: a folder without it is not a checkpoint.
Importing this module is cheap, because its functions import torch: a missing checkpoint is reported at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm import __version__, files
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.folder import SETTINGS
from lightlm.errors import CheckpointError
from lightlm.model.config import RENAMED_FIELDS, ModelConfig
from lightlm.names import warn
from lightlm.runs import MARKER, checkpoints, run_of, step_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lightlm.model.transformer import Transformer

TRAINING_STATE = "training_state.pt"
BEST = "best"
GENERATION = "generation_config.json"
MTP = "mtp."  # how names of weights of multi-token prediction begin
MODEL_WEIGHTS, RAW_WEIGHTS = "model.safetensors", "raw.safetensors"
_MODEL_FILES = (MODEL_WEIGHTS, "config.json", "tokenizer.json")  # a third of the bytes; the rest serves to resume
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")  # DistributedDataParallel's and torch.compile's prefixes


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is truncated, altered or unreadable. `problem` says how, without advice."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; use another checkpoint, or name the run to use its previous one")
        self.problem = problem


@dataclass
class LoadedModel:
    """A model ready to run, its tokenizer, and the folder that both came from."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path
    weights: tuple[Path, ...] = ()  # the files that hold them

    @property
    def name(self) -> str:
        """See `model_name`."""
        return model_name(self.path)


def model_name(path: Path) -> str:
    """Return run and step of a run's checkpoint (`demo/step_000200`), a Hub model's name, or that of another folder."""
    if path.name in ("", ".."):  # `.`, and folders above
        path = path.resolve()
    run = run_of(path)
    repository = path.parent.parent.name  # in the cache of the Hub: models--ORG--NAME/snapshots/REVISION
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return f"{run.name}/{path.name}" if run else path.name


def newest_checkpoint(
    run: Path, examine: Callable[[Path], None] | None = None, warn: Callable[[str], None] = warn
) -> Path:
    """Return the run's newest complete checkpoint that is not damaged; `warn` receives a message for each that is.

    Args:
        examine: raises DamagedCheckpointError for a damaged one; checks the model's files unless given.

    Raises:
        CheckpointError: the run has no checkpoint, or all are damaged.
    """
    problems = []
    passed: set[str] = set()
    while left := [path for path in checkpoints(run) if path.name not in passed]:
        path = left[-1]
        try:
            examine(path) if examine is not None else check(path, _MODEL_FILES)
        except (CheckpointError, FileNotFoundError) as error:
            if not (path / MARKER).is_file():  # the run trains and has pruned it; there are newer ones
                continue
            if not isinstance(error, DamagedCheckpointError):
                raise
            passed.add(path.name)
            problems.append(error.problem)
            continue
        for problem in problems:
            warn(f"{problem}; {path.name} is used instead")
        return path
    if problems:
        raise CheckpointError(
            f"all {len(problems)} checkpoints of {run} are damaged ({'; '.join(problems)}); "
            f"to restart the run with `lightlm train --resume {run}`, delete {run / 'checkpoints'}"
        )
    raise CheckpointError(
        f"no checkpoint yet in {run}: nothing complete under {run / 'checkpoints'}; "
        "let the run reach its first checkpoint, or choose another run"
    )


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder has LightLM's own format; it may be incomplete."""
    return (folder / "config.json").is_file() and _read_config(folder).get("model_type") == "lightlm"


def write_checkpoint(
    run: Path,
    step: int,
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    training_state: dict[str, Any] | None = None,
    raw: dict[str, Tensor] | None = None,
    *,
    milestone: bool = False,
) -> Path:
    """Write `checkpoints/step_...` of a run, point `latest` to it and return its path. A milestone is never pruned.

    Args:
        raw: the last weights, where `weights` is an average.
    """
    path = run / "checkpoints" / step_name(step)
    with files.new_folder(path, overwrite=True) as folder:
        if raw is not None:
            _save_weights(raw, folder / RAW_WEIGHTS)
        _fill(folder, weights, config, tokenizer, training_state, milestone)
    files.point_to(path.parent / "latest", path.name)
    return path


def mark_best(path: Path) -> None:
    """Point the run's `best` to this complete checkpoint, which is not pruned while it does."""
    files.point_to(path.parent / BEST, path.name)


def best_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint that the run's `best` points to, or None without one."""
    target = files.follow(run / "checkpoints" / BEST)
    return target if target is not None and (target / MARKER).is_file() else None


def is_milestone(checkpoint: Path) -> bool:
    """Return whether a complete checkpoint is never pruned."""
    try:
        return bool(json.loads((checkpoint / MARKER).read_text(encoding="utf-8")).get("milestone"))
    except (ValueError, AttributeError):
        return False


def save_model(path: Path, model: Transformer, tokenizer: Tokenizer, *, overwrite: bool = False) -> None:
    """Write a checkpoint folder without training state; raise FileExistsError if it exists, without `overwrite`."""
    with files.new_folder(path, overwrite=overwrite) as folder:
        _fill(folder, model.state_dict(), model.config, tokenizer, None, False)


def _fill(
    folder: Path, weights: dict[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, state: Any, milestone: bool
) -> None:
    """Write a checkpoint's files, then its marker, which lists all files in the folder."""
    import torch

    _save_weights(weights, folder / MODEL_WEIGHTS)
    values = {"model_type": "lightlm", "lightlm_version": __version__, "end_of_text_id": tokenizer.end_of_text_id}
    values["model"] = config.to_dict()
    if tokenizer.bos_id is not None or tokenizer.adds_bos:  # an imported model's
        values |= {"bos_token_id": tokenizer.bos_id, "adds_bos": tokenizer.adds_bos}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    for name, said in ((SETTINGS, tokenizer.settings), (GENERATION, tokenizer.generation_config)):
        if said:
            (folder / name).write_text(json.dumps(dict(said), indent=2) + "\n", encoding="utf-8")
    if state is not None:
        torch.save(state, folder / TRAINING_STATE)
    listed = sorted(folder.iterdir())
    marker: dict[str, Any] = {"milestone": True} if milestone else {}
    marker["files"] = {file.name: {"bytes": file.stat().st_size, "xxh3": files.checksum(file)} for file in listed}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _save_weights(weights: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(clean_state(weights), path, metadata={"format": "pt"})


def clean_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU under the names of a plain `Transformer`, without prefixes of wrappers."""
    return {_WRAPPERS.sub("", name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def check(folder: Path, names: Collection[str] | None = None) -> None:
    """Verify presence, size and checksum of a checkpoint's files (only of `names` if given) against its marker.

    Raises:
        DamagedCheckpointError: a file does not match; the message names the first.
        CheckpointError: the folder is not a complete checkpoint.
    """
    if not (folder / MARKER).is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {MARKER} is missing, so writing it was interrupted; "
            "use another checkpoint of the run, or delete this folder"
        )
    listing = _listing(folder)
    if unlisted := [name for name in names or _MODEL_FILES if name not in listing]:
        raise DamagedCheckpointError(f"{folder / MARKER} is damaged: it does not list {unlisted[0]}")
    for name in names or listing:
        size, checksum = listing[name]
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            if found is not None:
                files.refuse_lfs_pointer(folder / name)
            raise DamagedCheckpointError(
                f"{folder / name} is damaged: {MARKER} lists {size} bytes, "
                f"{'the file is missing' if found is None else f'it has {found}'}"
            )
        if files.checksum(folder / name) != checksum:
            raise DamagedCheckpointError(f"{folder / name} is damaged: its checksum is not the one in {MARKER}")


def is_untouched_model(folder: Path) -> bool:
    """Return whether a folder outside any run holds exactly what `save_model` wrote."""
    try:
        check(folder)
        names = {*_listing(folder), MARKER}
    except CheckpointError:
        return False
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found == names and TRAINING_STATE not in names and run_of(folder) is None


def _listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and checksum of each file that a complete checkpoint's marker lists."""
    try:
        entries = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return {name: (entry["bytes"], entry["xxh3"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError(f"{folder / MARKER} is damaged: it is not a list of files") from None


def has_average(folder: Path) -> bool:
    """Return whether a checkpoint holds an average of the weights beside the last ones."""
    return (folder / MARKER).is_file() and RAW_WEIGHTS in _listing(folder)


def has_mtp(folder: Path) -> bool:
    """Return whether a checkpoint holds heads of multi-token prediction."""
    from safetensors import safe_open

    with safe_open(folder / MODEL_WEIGHTS, "pt") as file:
        names = list(file.keys())
    return any(name.startswith(MTP) for name in names)


def load_weights(folder: Path, name: str = MODEL_WEIGHTS) -> dict[str, Tensor]:
    """Verify and load a file of weights."""
    check(folder, [name])
    from safetensors.torch import load_file

    return load_file(folder / name)


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    *,
    mtp: bool = False,
) -> LoadedModel:
    """Verify and load a checkpoint folder of LightLM's own format; the model is in evaluation mode.

    Args:
        dtype: precision of the weights; float32 unless given.
        weights: `ema` or `raw`, for a checkpoint that has both; None is the average where there is one.
        mtp: load the heads of multi-token prediction too, where the checkpoint has them.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or its weights do not fit its configuration.
    """
    file = RAW_WEIGHTS if weights == "raw" else MODEL_WEIGHTS
    check(folder, (file, *_MODEL_FILES[1:]))
    said = [name for name in (SETTINGS, GENERATION) if name in _listing(folder)]
    if said:
        check(folder, said)
    import torch
    from safetensors.torch import load_file

    config, shape = _read_config(folder), read_shape(folder)
    # A tokenizer.json does not name the token that ends a text: that of SmolLM2-Instruct is not <|endoftext|>.
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", end_of_text_id=config["end_of_text_id"])
    settings, generation = (
        files.read_object(folder / name, CheckpointError) if name in said else {} for name in (SETTINGS, GENERATION)
    )
    tokenizer = tokenizer.used_as(config.get("bos_token_id"), config.get("adds_bos", False), settings, generation)
    state = load_file(folder / file)
    if not mtp:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(MTP)}
    model = build_model(shape, state, str(folder)).to(device=device, dtype=dtype or torch.float32)
    return LoadedModel(model.eval(), tokenizer, folder, (folder / file,))


def no_average(path: Path) -> CheckpointError:
    """Return the error for a choice of weights where there is one set of them."""
    return CheckpointError(
        f"{path} holds one set of weights; only checkpoints of a run with train.ema hold two, an average and the last "
        "ones. Leave out the choice of weights"
    )


def read_shape(folder: Path) -> ModelConfig:
    """Return the shape of a checkpoint's model, without reading its weights.

    Raises:
        CheckpointError: config.json is damaged, or of another version.
    """
    path, config = folder / "config.json", _read_config(folder)
    if not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{path} is damaged: it has no section `model`")
    values = {RENAMED_FIELDS.get(key, key): value for key, value in config["model"].items()}
    if unknown := sorted(set(values) - {field.name for field in fields(ModelConfig)}):
        raise CheckpointError(
            f"{path} has the unknown keys {', '.join(unknown)}; "
            f"it was written by another version of LightLM (this is {__version__})"
        )
    try:
        return ModelConfig(**values).resolved()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a model: {error}") from None


def build_model(config: ModelConfig, state: dict[str, Tensor], where: str) -> Transformer:
    """Return a model with exactly these weights, in their precision; `where` is their folder, for messages.

    It has as many heads of multi-token prediction as the weights.

    Raises:
        CheckpointError: a weight is missing, unknown, or has the wrong shape; the message lists up to five.
    """
    import torch

    from lightlm.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config, len({name.split(".")[1] for name in state if name.startswith(MTP)}))
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
    return files.read_object(folder / "config.json", CheckpointError)
