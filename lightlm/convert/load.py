"""MODEL on the command line: find and load the model that a user names, in whatever form.

Importing this module is cheap: a model that does not exist is reported before torch is imported.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightlm import checkpoint, files
from lightlm.checkpoint import LoadedModel
from lightlm.convert.formats import format_of, read_model, reader_of
from lightlm.convert.huggingface.config import WEIGHT_FILES
from lightlm.data.tokenizer.named import NAMED_TOKENIZERS as NAMED_MODELS
from lightlm.errors import CheckpointError, LightLMError, RecipeError
from lightlm.names import note_clash, warn
from lightlm.recipe import Start
from lightlm.runs import RECIPE, RUNS, find_run, run_names, run_of

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
_SMALL_FILES += ["special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"]
_SMALL_FILES += ["tokenizer.model", "spiece.model", "chat_template.jinja", "additional_chat_templates/*.jinja"]
_SMALL_FILES += [checkpoint.MARKER]

_WEIGHTS = ([*WEIGHT_FILES[:2], "model-*.safetensors"], [*WEIGHT_FILES[2:], "pytorch_model-*.bin"])


def load_pretrained(
    reference: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
) -> LoadedModel:
    """Load a model in evaluation mode. The `path` of a model from the Hub is its id.

    Args:
        reference: a run folder or a run's name (its newest checkpoint), a checkpoint folder, a model in any other
            format of `lightlm convert --list`, or a Hub id such as `HuggingFaceTB/SmolLM2-135M`; None means the newest
            checkpoint of `runs/latest`. A bare name means a run, then a row of `NAMED_MODELS`, then a folder here, with
            a note where two of them exist (see `lightlm.names`). A path takes precedence over a Hub id.
        dtype: precision of the weights; float32 unless given.
        weights: `ema` or `raw`, for a checkpoint that holds both; None is the average where there is one.

    Raises:
        CheckpointError: nothing is found there (the message lists what was tried), it is damaged, or the Hub
            cannot be reached.
        ConvertError: LightLM cannot represent the model.
    """
    loaded = with_model(reference, lambda path: read_model(path, weights))
    loaded.model.to(device=device, dtype=dtype)  # None keeps the readers' float32
    return replace(loaded, path=Path(reference)) if reference is not None and is_hub_id(reference) else loaded


def with_model(reference: str | Path | None, use: Callable[[Path], T]) -> T:
    """Return `use(path)` for the model that `locate` finds.

    A run that is being trained deletes old checkpoints: if that happens before `use` has read its files, take the newer
    one.
    """
    while True:
        path = locate(reference)
        try:
            return use(path)
        except (LightLMError, OSError):
            if path.exists() or run_of(path) is None:
                raise


def find_start(reference: str, key: str = "train.init_from") -> Start:
    """Return the model that a key of a recipe names, which is what `load_pretrained` takes, without its weights.

    Raises:
        RecipeError: there is none, it is damaged, or LightLM cannot represent it.
    """
    try:
        path = locate(reference, weights=False)
        shape = reader_of(path).shape(path)
    except LightLMError as error:
        raise RecipeError(f"{key}: {error}") from None
    # A reference that a later run of the same name does not change, such as one that is called gpt2.
    if is_hub_id(reference):
        return Start(NAMED_MODELS.get(reference, reference), shape)
    return Start(f"./{path}" if _is_bare(str(path)) else path.as_posix(), shape)


def locate(reference: str | Path | None = None, *, weights: bool = True) -> Path:
    """Return the path of the model that `load_pretrained` would load; download it first if it is a Hub id.

    For a run it is the newest undamaged checkpoint, with a warning if a newer one is damaged. Without `weights`, only
    the description of a model on the Hub is downloaded.
    """
    if reference is None or Path(reference) == RUNS / "latest":
        return checkpoint.newest_checkpoint(find_run())
    if reference in NAMED_MODELS or (RUNS / reference / RECIPE).is_file():
        _note_clash(str(reference))
    if folder := _on_disk(reference):
        return checkpoint.newest_checkpoint(folder) if (folder / RECIPE).is_file() else folder
    if is_hub_id(reference):
        return _download(NAMED_MODELS.get(str(reference), str(reference)), weights)
    given = Path(reference)
    there = "the folder holds neither recipe.yaml nor config.json" if given.is_dir() else "there is no such folder"
    if given.is_file():
        files.refuse_lfs_pointer(given)
        there = "no format of `lightlm convert --list` recognizes this file"
    raise CheckpointError(
        f"no model at {given}: {there}, no run has that name (runs here: {run_names()}), and it is not "
        "a Hub id (ORG/NAME, such as HuggingFaceTB/SmolLM2-135M)"
    )


def is_hub_id(reference: str | Path) -> bool:
    """Return whether a reference means a model on the Hub: it is ORG/NAME, and ORG is not a folder here.

    Or it is a row of `NAMED_MODELS` and no run has this name.
    """
    if reference in NAMED_MODELS:
        return _on_disk(reference) is None
    return bool(_HUB_ID.fullmatch(str(reference))) and not _on_disk(reference) and not Path(reference).parent.is_dir()


def _on_disk(reference: str | Path) -> Path | None:
    """Return the run folder or model at this path or name, or None."""
    places = [RUNS / reference, Path(reference)] if _is_bare(reference) else [Path(reference), RUNS / reference]
    if reference in NAMED_MODELS:
        places.pop()
    return next(filter(None, map(_model_at, places)), None)


def _model_at(given: Path) -> Path | None:
    # runs/latest, checkpoints/latest and checkpoints/best are links, or text files where links are not allowed.
    path = (files.follow(given) if given.name in ("latest", checkpoint.BEST) else None) or given
    return path if (path / RECIPE).is_file() or format_of(path) else None


def _is_bare(reference: str | Path) -> bool:
    return isinstance(reference, str) and not reference.startswith(".") and not set(reference) & {"/", os.sep}


@functools.cache  # an evaluation looks its models up more than once
def _note_clash(name: str) -> None:
    """Say what a bare name means, where it might also be a folder here or a model on the Hub."""
    run = (RUNS / name / RECIPE).is_file()
    if not _is_bare(name):
        return
    if run and name in NAMED_MODELS:
        warn(f"{name} means the run {RUNS / name}; for the model on the Hub write {NAMED_MODELS[name]}")
    meaning = f"the run {RUNS / name}" if run else f"{NAMED_MODELS[name]} on the Hugging Face Hub"
    note_clash(name, meaning, filter(_model_at, [Path(name)]))


def _download(hub_id: str, weights: bool) -> Path:
    """Download a model from the Hub; PyTorch files only if it has no safetensors."""
    import huggingface_hub

    for patterns in _WEIGHTS if weights else ([],):
        try:
            path = huggingface_hub.snapshot_download(hub_id, allow_patterns=_SMALL_FILES + patterns, etag_timeout=5.0)
        except Exception as error:  # the types depend on the version of its network library
            reason = next(iter(str(error).splitlines()), "no reason given")
            raise CheckpointError(
                f"no model {hub_id}: there is no such folder here, and the Hugging Face Hub did not provide it "
                f"({type(error).__name__}: {reason}); without a connection, "
                "name a run, a checkpoint folder, a downloaded Hugging Face folder, or a Hub model used here before"
            ) from None
        if any((Path(path) / name).is_file() for name in patterns):
            break
    return Path(path)
