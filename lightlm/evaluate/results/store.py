"""lm-eval's results as rows of a table (`figures`, which reports use without lm-eval), and as files."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable

from lightlm import files
from lightlm.checkpoint import LoadedModel
from lightlm.evaluate.results.rows import Row as Row
from lightlm.evaluate.results.rows import rows as rows
from lightlm.evaluate.runner import Settings
from lightlm.runs import run_of

_MAX_STEM = 120  # a file name ends at 255 bytes; a long list of tasks is cut and told apart by a hash


def file_stem(settings: Settings) -> str:
    """A file name for these settings, so that a trial with --limit never replaces a full result."""
    stem = "+".join(Path(task).stem for task in settings.tasks)
    if len(stem) > _MAX_STEM:
        stem = f"{stem[:_MAX_STEM]}~{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
    stem += "" if settings.num_fewshot is None else f"_{settings.num_fewshot}shot"
    stem += {"auto": "", "yes": "_bos", "no": "_nobos"}[settings.bos]
    stem += "" if settings.dtype == "auto" else f"_{settings.dtype}"
    stem += "" if settings.data is None else f"_{Path(settings.data).resolve().name}"
    return stem + ("" if settings.limit is None else f"_limit{settings.limit}")


def result_file(loaded: LoadedModel, settings: Settings, out: Path | None, name: str | None = None) -> Path | None:
    """Where results go: `out` if it is a .json file, a file of its own in the folder `out`, or without `out`
    `<run>/eval/<step>_<tasks>.json`; None for a model that belongs to no run.

    Args:
        name: of the model, where its own is also another's.
    """
    if out is not None and out.suffix == ".json":
        return out
    file = f"{file_stem(settings)}.json"
    if out is not None:
        return out / f"{re.sub(r'[/:]', '_', name or loaded.name)}_{file}"
    run = run_of(loaded.path)
    return run / "eval" / f"{loaded.path.resolve().name}_{file}" if run else None


def write(path: Path, results: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write lm-eval's document to `path` untouched, and what it has no place for to `<name>.meta.json` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    files.write_text(path, document + "\n")
    files.write_text(path.with_suffix(".meta.json"), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
