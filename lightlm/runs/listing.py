"""What `lightlm runs ls` shows of a run, read from its files within milliseconds and without torch."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lightlm import files
from lightlm.quantities import parse_quantity
from lightlm.runs.folders import MARKER, RECIPE, RUNS, checkpoints, mark_latest, runs_here
from lightlm.runs.lock import Holder, holder
from lightlm.runs.metrics import METRICS, last_metrics

State = Literal["training", "complete", "stopped", "interrupted", "no checkpoint", "damaged"]
STATES_TO_RESUME = ("stopped", "interrupted")


@dataclass(frozen=True)
class Summary:
    """A run at a glance; None for what its files do not say.

    Attributes:
        state: `stopped` has its last step saved, `interrupted` has not (a kill); `damaged` means the recipe, the
            metrics or the newest checkpoint.
        trainer: the process that trains it.
        step: the last one logged, or that of the newest checkpoint if it logged none.
        target_tokens: `train.tokens` of its recipe.
        init_from: the model that it started from, `train.init_from` of its recipe; None without one.
        loss, val_loss: the last ones measured.
        size: bytes on disk, without what links lead to.
        modified: when it last wrote metrics or a checkpoint, in seconds since 1970.
    """

    path: Path
    state: State
    trainer: Holder | None
    step: int
    tokens: int | None
    target_tokens: int | None
    init_from: str | None
    loss: float | None
    val_loss: float | None
    size: int
    modified: float

    def to_dict(self) -> dict[str, Any]:
        """Return the run's entry of `lightlm runs ls --json`."""
        trainer = None if self.trainer is None else vars(self.trainer)
        modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.modified))
        return {"name": self.path.name, **vars(self), "path": str(self.path), "trainer": trainer, "modified": modified}


def list_runs() -> list[Summary]:
    """Return the runs in `runs/`, newest first."""
    found = [summary for run in runs_here() if (summary := summarize(run)) is not None]
    return sorted(found, key=lambda summary: summary.modified, reverse=True)


def summarize(run: Path) -> Summary | None:
    """Read a run; None if its folder holds none, or is being deleted."""
    try:
        modified = max(path.stat().st_mtime for path in _written_by_training(run))
    except (OSError, ValueError):
        return None
    trainer, (target, init_from) = holder(run), _recipe_facts(run)
    saved = _saved_step(run)
    damaged = target is None or saved is None
    last: dict[str, Any] = {}
    val_loss = None
    try:
        last, val_loss = last_metrics(run)
    except (OSError, ValueError, KeyError):
        damaged = True
    step, tokens = last.get("step", saved or 0), last.get("tokens")
    state: State = "stopped"
    if trainer is not None:
        state = "training"
    elif damaged:
        state = "damaged"
    elif not saved:
        state = "no checkpoint"
    elif saved < step:
        state = "interrupted"
    elif last.get("stopped_early") or (target is not None and tokens is not None and tokens >= target):
        state = "complete"
    loss = last.get("loss")
    return Summary(run, state, trainer, step, tokens, target, init_from, loss, val_loss, disk_bytes(run), modified)


def _written_by_training(run: Path) -> list[Path]:
    paths = (run / RECIPE, run / METRICS, run / "checkpoints")
    return [path for path in paths if path.exists()] if (run / RECIPE).is_file() else []


def _recipe_facts(run: Path) -> tuple[int | None, str | None]:
    """Return `train.tokens` and `train.init_from` of the run's recipe; None if it cannot be read."""
    try:
        text = (run / RECIPE).read_text(encoding="utf-8")
        values = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return parse_quantity(values["train"]["tokens"]), values["train"].get("init_from")
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError):
        return None, None


def _saved_step(run: Path) -> int | None:
    """Return the step of the newest checkpoint, 0 without one; None if a file of it has not the size that it should."""
    if not (complete := checkpoints(run)):
        return 0
    newest = complete[-1]
    try:
        listed = json.loads((newest / MARKER).read_text(encoding="utf-8"))["files"]
        whole = all((newest / name).stat().st_size == entry["bytes"] for name, entry in listed.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    return int(newest.name.removeprefix("step_")) if whole else None


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:  # a checkpoint that was pruned meanwhile
                continue
    return total


def mend_latest() -> Path | None:
    """Point `runs/latest` to the newest run if the run that it points to does not exist, or remove it without any run.

    Return the run that it points to now; None if nothing changed.
    """
    pointer = RUNS / "latest"
    target = files.follow(pointer)
    if target is None or (target / RECIPE).is_file():
        return None
    if left := list_runs():
        mark_latest(left[0].path)
        return left[0].path
    pointer.unlink()
    return None
