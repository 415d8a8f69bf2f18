"""Run folders `runs/<name>/`: create one, find one, and the pointer `runs/latest`.

    runs/<name>/recipe.yaml metrics.jsonl machine.json checkpoints/ eval/ samples/ plots/

`lightlm.checkpoint` describes what lies in `checkpoints/`.
"""

import re
from pathlib import Path

from lightlm import files
from lightlm.errors import CheckpointError, UsageError
from lightlm.recipe import NAME_PATTERN

RUNS = Path("runs")
RECIPE = "recipe.yaml"  # a folder with this file is a run


def run_folder(name: str) -> Path:
    """Return `runs/<name>`, which need not exist.

    Raises:
        UsageError: the name is not a plain folder name.
    """
    if not re.fullmatch(NAME_PATTERN, name) or name == "latest":
        raise UsageError(f"'{name}' cannot name a run: use letters, digits, '.', '_' and '-', and not 'latest'")
    return RUNS / name


def free_folder(name: str, *, exact: bool) -> Path:
    """Return the path of a run folder that does not exist yet.

    Args:
        exact: refuse a name that is taken; otherwise return the first free one of `name`, `name-2`, `name-3`, ...

    Raises:
        UsageError: as `run_folder`.
        CheckpointError: the name is taken.
    """
    path, number = run_folder(name), 1
    # A folder that a kill left before its recipe was written is free: it holds at most temporary files.
    while path.exists() and not (path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir())):
        if exact:
            raise CheckpointError(
                f"{path} exists already; resume it with --auto-resume or `lightlm train --resume {path}`, "
                "or choose another --name"
            )
        number += 1
        path = RUNS / f"{name}-{number}"
    return path


def new_run(name: str, *, exact: bool) -> Path:
    """Create the folder that `free_folder` names; it raises the same errors."""
    path = free_folder(name, exact=exact)
    path.mkdir(parents=True, exist_ok=True)
    return path


def find_run(reference: str | Path | None = None) -> Path:
    """Return the folder of a run given by path or by name under `runs/`; None is the newest run (`runs/latest`).

    Raises:
        CheckpointError: the run does not exist.
    """
    newest = RUNS / "latest"
    reference = Path(reference or newest)
    for path in (reference, RUNS / reference):
        # Follow a pointer even if it is a link, so that `mark_latest` never points `latest` to itself.
        if path.name == newest.name and (target := files.follow(path)) is not None and target.is_dir():
            return target
        if (path / RECIPE).is_file():
            return path
    if reference == newest:
        raise CheckpointError(
            f"no run yet: {newest} does not exist in {Path.cwd()}; "
            "train a model first (`lightlm train recipes/demo.yaml`) or name a model folder"
        )
    raise CheckpointError(f"no run at {reference}: it holds no {RECIPE}; runs here: {run_names()}")


def run_names() -> str:
    """Return the names of the runs in this folder, for messages."""
    names = {path.parent.name for path in RUNS.glob(f"*/{RECIPE}")} - {"latest"}
    return ", ".join(sorted(names)) or "none"


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint belongs to, or None for a model folder outside any run."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def mark_latest(run: Path) -> None:
    """Point `runs/latest` to this run if it lies in `runs`."""
    if run.resolve().parent == RUNS.resolve():
        files.point_to(RUNS / "latest", run.resolve().name)
