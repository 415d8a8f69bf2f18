"""MODEL on the command line: whatever a user may name, as a model ready to run."""

import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import torch

from lightlm import checkpoint, files
from lightlm.checkpoint import LoadedModel
from lightlm.convert.huggingface.folder import import_huggingface
from lightlm.convert.huggingface.weights import WEIGHT_FILES
from lightlm.errors import CheckpointError
from lightlm.runs import RUNS, find_run, run_names

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
_SMALL_FILES += ["special_tokens_map.json", checkpoint.MARKER]
_CONNECT_SECONDS = 5.0


def load_pretrained(
    reference: str | Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a model for evaluation, whatever form it is named in.

    Args:
        reference: a run folder or a run's name (its newest checkpoint), a checkpoint folder, a Hugging Face folder,
            or a Hub id such as `HuggingFaceTB/SmolLM2-135M`; None is the newest checkpoint of `runs/latest`.
            What exists on disk comes before the Hub.

    Returns:
        The model; the `path` of one from the Hub is its id.

    Raises:
        CheckpointError: nothing is found there (the message lists what was tried), it is damaged, or the Hub
            cannot be reached.
        ConvertError: it is a Hugging Face model that LightLM cannot represent.
    """
    folder = locate(reference)
    if checkpoint.is_checkpoint(folder) or not (folder / "config.json").is_file():
        return checkpoint.load_model(folder, device, dtype)
    loaded = import_huggingface(folder)
    loaded.model.to(device=device, dtype=dtype)
    return replace(loaded, path=Path(reference)) if reference is not None and is_hub_id(reference) else loaded


def locate(reference: str | Path | None = None) -> Path:
    """The checkpoint or Hugging Face folder that a reference names, downloaded first if it is a Hub id.

    Of a run it is the newest checkpoint that is whole, with a warning if that is not the newest.

    Raises:
        CheckpointError: see `load_pretrained`.
    """
    if reference is None or Path(reference) == RUNS / "latest":
        return checkpoint.newest_checkpoint(find_run())
    if folder := _on_disk(reference):
        return checkpoint.newest_checkpoint(folder) if (folder / "recipe.yaml").is_file() else folder
    if is_hub_id(reference):
        return _download(str(reference))
    raise CheckpointError(_nothing_found(Path(reference)))


def is_hub_id(reference: str | Path) -> bool:
    """Whether a reference is to be sought on the Hub: ORG/NAME, and ORG is no folder here."""
    return bool(_HUB_ID.fullmatch(str(reference))) and not _on_disk(reference) and not Path(reference).parent.is_dir()


def _on_disk(reference: str | Path) -> Path | None:
    """The run or model folder of this path or name."""
    for given in (Path(reference), RUNS / reference):
        path = files.follow(given) or given  # checkpoints/latest is a text file on some machines
        if any((path / name).is_file() for name in ("recipe.yaml", "config.json")):
            return path
        if path.is_dir() and path.name.startswith("step_"):
            return path
    return None


def _nothing_found(given: Path) -> str:
    there = "the folder holds neither recipe.yaml nor config.json" if given.is_dir() else "there is no such folder"
    return (
        f"no model at {given}: {there}, no run of that name (runs here: {run_names()}), and it is no Hub id "
        "that could be fetched (ORG/NAME, such as HuggingFaceTB/SmolLM2-135M)"
    )


def _download(hub_id: str) -> Path:
    folder = _snapshot(hub_id, [*_SMALL_FILES, *WEIGHT_FILES[:2], "model-*.safetensors"])
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        return folder
    return _snapshot(hub_id, [*_SMALL_FILES, *WEIGHT_FILES[2:], "pytorch_model-*.bin"])


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=_CONNECT_SECONDS))
    except Exception as error:  # its network library, and with it the exceptions, depends on its version
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise CheckpointError(
            f"no model {hub_id}: there is no such folder here, and it could not be had from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); without a connection, "
            "name a run, a checkpoint folder, a downloaded Hugging Face folder, or a Hub model used here before"
        ) from None
