"""The files of an evaluation, in the folder `eval/` of a run or in `--out`.

<name>.json                  lm-eval's results, unchanged
<name>.meta.json             settings, model, data, machine and versions, which lm-eval's format has no place for
<name>.documents.jsonl       each document's figures (see `documents.py`)
<name>.samples_<task>.jsonl  prompts and answers in lm-eval's format, with --log-samples
<name>.partial.json          the finished tasks, while others are being scored; it remains if the process is killed, and
                             if tasks failed or were interrupted and a file of the others' results exists, or `--out`
                             names one
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightlm import files
from lightlm.checkpoint import LoadedModel
from lightlm.evaluate.results import documents
from lightlm.evaluate.settings import Settings
from lightlm.machine import environment
from lightlm.runs import run_of

_PACKAGES = ("lm_eval", "datasets", "tokenizers", "huggingface_hub", "safetensors")
_MAX_STEM = 120  # file names end at 255 bytes; a long list of tasks is cut and gets a hash
_REFUSED = re.compile(r'[<>:"/\\|?*]')  # in file names on Windows


def file_stem(settings: Settings) -> str:
    """Return a file name for these settings, so that a trial with --limit never replaces a full result."""
    # A task may be a file; another name may have a dot.
    stem = "+".join(Path(task).stem if task.endswith((".yaml", ".yml")) else Path(task).name for task in settings.tasks)
    stem = _REFUSED.sub(lambda found: f"%{ord(found[0]):02X}", stem)  # of globs: `*` and `?` stay apart
    if len(stem) > _MAX_STEM:
        stem = f"{stem[:_MAX_STEM]}~{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
    stem += "" if settings.num_fewshot is None else f"_{settings.num_fewshot}shot"
    stem += {"auto": "", "yes": "_bos", "no": "_nobos"}[settings.bos]
    stem += "_chat" if settings.apply_chat_template else ""
    stem += "_singleturn" if settings.fewshot_as_multiturn is False else ""
    if settings.system_instruction is not None:
        stem += f"_system~{hashlib.sha256(settings.system_instruction.encode()).hexdigest()[:8]}"
    stem += "" if settings.dtype == "auto" else f"_{settings.dtype}"
    stem += "" if settings.chosen_weights is None else f"_{settings.chosen_weights}"
    for name in (settings.include_name, settings.data_name):  # tasks may replace stock ones of the same name
        stem += name and f"_{name}"
    return stem + ("" if settings.limit is None else f"_limit{settings.limit}")


def result_file(loaded: LoadedModel, settings: Settings, out: Path | None, name: str | None = None) -> Path | None:
    """Return the path of the results: `out` if it ends in .json, else a file in the folder `out`.

    Without `out` it is `<run>/eval/<step>_<tasks>.json`, and None for a model that belongs to no run.

    Args:
        name: the model's name, if another model has the same.
    """
    if out is not None:
        return out_file(out, settings, name or loaded.name)
    run = run_of(loaded.path)
    return run / "eval" / f"{loaded.path.resolve().name}_{file_stem(settings)}.json" if run else None


def out_file(out: Path, settings: Settings, name: str) -> Path:
    """Return the path of a model's results at `--out`: `out` if it ends in .json, else a file in the folder `out`."""
    return out if out.suffix == ".json" else out / f"{re.sub(r'[/:]', '_', name)}_{file_stem(settings)}.json"


def progress_file(path: Path) -> Path:
    """Return the file for the tasks that are finished while others are being scored, or are missing at the end."""
    return path.with_suffix(".partial.json")


def remove_progress(path: Path) -> None:
    """Remove what was written to `progress_file(path)`."""
    partial = progress_file(path)
    _remove_samples(partial)
    for name in (partial, partial.with_suffix(".meta.json"), documents.documents_file(partial)):
        name.unlink(missing_ok=True)


def _remove_samples(path: Path) -> None:
    """Remove the samples beside the results in `path`."""
    for name in path.parent.glob(f"{glob.escape(path.stem)}.samples_*.jsonl"):
        name.unlink(missing_ok=True)


def write(
    path: Path, results: dict[str, Any], facts: dict[str, Any], scored: Iterable[documents.Document] = ()
) -> None:
    """Write lm-eval's results to `path`, and beside it the facts and versions, and the documents' figures.

    Samples of results that are replaced are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(results, indent=2, default=_plain, ensure_ascii=False) + "\n")
    files.write_text(path.with_suffix(".meta.json"), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    documents.write(documents.documents_file(path), scored)
    _remove_samples(path)


def write_samples(path: Path, samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write lm-eval's samples beside the results in `path`, as its `--log_samples` does."""
    for task, entries in samples.items():
        lines = []
        for entry in entries:
            # Arguments get names and answers become text, so that `datasets` can read the file.
            texts = {key: _text(entry[key]) for key in ("resps", "filtered_resps")} | {"target": str(entry["target"])}
            calls = ({f"arg_{j}": part for j, part in enumerate(call)} for call in entry["arguments"])
            texts["arguments"] = {f"gen_args_{i}": call for i, call in enumerate(calls)}
            lines.append(json.dumps({**entry, **texts}, default=_plain, ensure_ascii=False) + "\n")
        files.write_text(path.with_suffix(f".samples_{task}.jsonl"), "".join(lines))


def _text(value: Any) -> Any:
    return [_text(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _plain(value: Any) -> Any:
    """Convert a value that JSON lacks: scalars of numpy, sets, and the rest to text."""
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, set) else str(value)


def hash_weights(loaded: LoadedModel) -> dict[str, str | None]:
    """Return the sha256 of each file with the model's weights, as the Hub shows it; None for a file that is missing."""
    return {path.name: sha256(path) if path.is_file() else None for path in loaded.weights}


def provenance(
    loaded: LoadedModel, weights: Mapping[str, str | None], data_sets: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return what a score depends on beside the settings.

    Args:
        weights: what `hash_weights` returned when the model was loaded.
        data_sets: origin of each data set that was read.

    Returns:
        `weights`; `revision`: the Hub's commit of a model from there; `data_sets`, and the entries of
        `machine.environment`.
    """
    # The Hub's cache has a model's files in `snapshots/<commit>`.
    folders = [path.parent for path in loaded.weights[:1] if path.parent.parent.name == "snapshots"]
    return {
        "weights": dict(weights),
        "revision": folders[0].name if folders else None,
        "data_sets": data_sets,
        **environment(device, *_PACKAGES),
    }


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
