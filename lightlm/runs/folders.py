"""Run folders: name, claim, find and remove them, their checkpoints, and the pointer `runs/latest`."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightlm import files
from lightlm.errors import CheckpointError, UsageError
from lightlm.recipe import NAME_PATTERN
from lightlm.runs.lock import RunLockedError, locked, require_unlocked

RUNS = Path("runs")
RECIPE = "recipe.yaml"  # a folder with this file is a run
MARKER = "complete.json"  # a checkpoint folder with this file is complete
_OVERRIDES = ".overrides.json"  # of the command that began a run; hidden, so that the folder counts as unstarted
_STEP_NAME = re.compile(r"step_(\d+)")


def run_folder(name: str, parent: Path = RUNS) -> Path:
    """Return `<parent>/<name>`, which need not exist.

    Raises:
        UsageError: the name is not a plain folder name.
    """
    if not re.fullmatch(NAME_PATTERN, name) or name == "latest":
        raise UsageError(f"'{name}' cannot name a run: use letters, digits, '.', '_' and '-', and not 'latest'")
    return parent / name


@contextlib.contextmanager
def new_run(name: str, *, exact: bool, overwrite: bool = False, parent: Path = RUNS) -> Iterator[Path]:
    """Context manager that creates the folder of a new run and holds its lock (see `runs.lock`).

    A folder in which no run has begun when the context ends is removed.

    Args:
        exact: refuse a name that is taken, but take over a folder without a run, which a kill may have left. Otherwise
            use the first free one of `name`, `name-2`, `name-3`, ...
        overwrite: delete the run of this name first; implies `exact`.
        parent: the folder that receives it.

    Raises:
        UsageError: as `run_folder`, or the working directory is in the run to overwrite.
        CheckpointError: the name is taken, or the run to overwrite is being trained.
    """
    if exact or overwrite:
        path = run_folder(name, parent)
        require_free(path, overwrite=overwrite)
        if (path / RECIPE).is_file():
            remove_run(path)
        _make_folder(parent)
        path.mkdir(exist_ok=True)
    else:
        path = claim_folder(name, parent)
    with locked(path):
        require_free(path)  # another process may have used the folder between its creation and its lock
        try:
            yield path
        finally:
            _discard(path)


def record_overrides(run: Path, overrides: Sequence[str]) -> None:
    """Keep the overrides of the command that begins a run."""
    files.write_text(run / _OVERRIDES, json.dumps(list(overrides), ensure_ascii=False) + "\n")


def later_overrides(run: Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that are new to a run, for a command that is given again.

    The others are in its recipe already, some of them worked out further: `train.init_from` names a checkpoint there,
    and --max-minutes has made `train.tokens` smaller.
    """
    known = _known_overrides(run)
    return [override for override in overrides if override not in known]


def record_later_overrides(run: Path, overrides: Sequence[str]) -> None:
    """Let overrides that a resumed run has taken replace those of the same keys, which are new to it from now on."""
    keys = {_key(override) for override in overrides}
    record_overrides(run, [*(each for each in _known_overrides(run) if _key(each) not in keys), *overrides])


def _key(override: str) -> str:
    return override.partition("=")[0]


def _known_overrides(run: Path) -> list[str]:
    try:
        known: list[str] = json.loads((run / _OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # an earlier version began it
        return []
    return known


def claim_folder(name: str, parent: Path = RUNS) -> Path:
    """Create the first free folder of `name`, `name-2`, ... and return it. Two processes never get the same one."""
    path, number = run_folder(name, parent), 1
    _make_folder(parent)
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            path = parent / f"{name}-{number}"
        else:
            return path


def _make_folder(parent: Path) -> None:
    """Create the folder of runs unless it is there.

    Raises:
        CheckpointError: something else has its name.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        what = "leads to nothing (is its disk mounted?)" if parent.is_symlink() else "is not a folder"
        raise CheckpointError(f"{parent} {what}; runs cannot be kept there") from None


def require_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that a new run must not use.

    Args:
        overwrite: accept a run that no process trains.

    Raises:
        CheckpointError: the folder holds a run or other files.
        UsageError: the working directory is in the run to replace.
    """
    if not os.path.lexists(path) or _is_unstarted(path):
        return
    if not (path / RECIPE).is_file():
        raise CheckpointError(f"{path} exists already and is not a run, so it is not replaced; choose another --name")
    if overwrite:
        files.refuse_working_folder(path)
        require_unlocked(path)
        return
    raise CheckpointError(
        f"{path} exists already; resume it with `lightlm train --resume {path}`, replace it with --overwrite, "
        "or choose another --name"
    )


def discard_unstarted(path: Path) -> None:
    """Remove a claimed folder in which no run has begun, unless a process is about to begin one."""
    if _is_unstarted(path):
        with contextlib.suppress(RunLockedError), locked(path):
            _discard(path)


def _discard(path: Path) -> None:
    if _is_unstarted(path) and not path.is_symlink():  # the user made the link, for a folder elsewhere
        with contextlib.suppress(OSError):
            files.remove_folder(path)


def _is_unstarted(path: Path) -> bool:
    """Return whether a folder holds nothing, or only the lock and temporary files of a start that was killed."""
    return path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir())


def remove_run(run: Path) -> None:
    """Delete a run. A symbolic link is deleted as a link: the folder that it leads to stays.

    Raises:
        RunLockedError: a process trains it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run))
        if os.name == "nt":  # which cannot rename a folder with an open file
            stack.close()
        files.remove_folder(run)


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
            if os.path.abspath(path) == os.path.abspath(newest):
                raise CheckpointError(
                    f"{newest} is a copy of a run and not a link to the newest one, made by a tool that copies what "
                    f"links lead to; name one of these: {run_names()}"
                )
            return path
    if reference == newest and runs_here():
        raise CheckpointError(f"{newest} leads to no run; name one of these: {run_names()}")
    if reference == newest:
        raise CheckpointError(
            f"no run yet: {newest} does not exist in {Path.cwd()}; "
            "train a model first (`lightlm train recipes/demo.yaml`) or name a model folder"
        )
    inside = sorted(path.parent for pattern in ("*", "runs/*") for path in reference.glob(f"{pattern}/{RECIPE}"))
    inside = [path for path in inside if not path.name.startswith(".")]  # what a kill left of a replaced folder
    if inside:  # a sweep, a project, or `runs` itself
        raise CheckpointError(f"no run at {reference}: it holds runs; name one, such as {inside[0]}")
    raise CheckpointError(f"no run at {reference}: it holds no {RECIPE}; runs here: {run_names()}")


def run_names() -> str:
    """Return the names of the runs in this folder, for messages."""
    return ", ".join(sorted(path.name for path in runs_here())) or "none"


def runs_here() -> list[Path]:
    """Return the runs in `runs/`, in no order; without `latest`, and without folders that are being deleted."""
    paths = (path.parent for path in RUNS.glob(f"*/{RECIPE}"))
    return [path for path in paths if path.name != "latest" and not path.name.startswith(".")]


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint belongs to, or None for a model folder outside any run."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / RECIPE).is_file() else None


def mark_latest(run: Path) -> None:
    """Point `runs/latest` to this run if it lies in `runs`."""
    run = Path(os.path.abspath(run))  # a link in `runs` stays a link
    if run.parent.resolve() == RUNS.resolve():
        files.point_to(RUNS / "latest", run.name)


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint folder."""
    return f"step_{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest first."""
    named = {path: _STEP_NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step_*")}
    steps = {path: int(match[1]) for path, match in named.items() if match and (path / MARKER).is_file()}
    return sorted(steps, key=steps.__getitem__)
