"""Where a result comes from: model, data, machine and versions, for the file beside lm-eval's own."""

import hashlib
from pathlib import Path
from typing import Any

from lightlm.checkpoint import LoadedModel
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.runner import Tasks
from lightlm.machine import environment

_PACKAGES = ("lm_eval", "datasets", "tokenizers", "huggingface_hub", "safetensors")


def provenance(lm: LightLM, tasks: Tasks) -> dict[str, Any]:
    """What a score depends on beside the command's own settings.

    Returns:
        `weights`: the sha256 of each file, as the Hub shows it; `revision`, the Hub's commit of a model from there.
        `data_sets`: for each, the folder or `hub`, and its commit where that is known.
        The entries of `machine.environment`.
    """
    return {
        "weights": {path.name: sha256(path) for path in lm.loaded.weights},
        "revision": _model_revision(lm.loaded),
        "data_sets": tasks.data_sets.origins(),
        **environment(lm.device, *_PACKAGES),
    }


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_bos(lm: LightLM, setting: str) -> dict[str, Any]:
    """What a model was shown before the texts of tasks: before every context, and for a text without one."""
    name = lm.loaded.tokenizer.name_of
    return {
        "setting": setting,
        "before_contexts": [{"id": token, "token": name(token)} for token in lm.prefix_ids],
        "without_context": {"id": lm.prefix_token_id, "token": name(lm.prefix_token_id)},
    }


def _model_revision(loaded: LoadedModel) -> str | None:
    """The commit of a model in the Hub's cache, whose files lie in `snapshots/<commit>`."""
    folders = [path.parent for path in loaded.weights[:1]]
    return next((folder.name for folder in folders if folder.parent.name == "snapshots"), None)
