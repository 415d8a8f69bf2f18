"""What users name: tasks and folders, checked without lm-eval, whose import takes seconds.

`Tasks` finds the same mistakes and more, such as unknown tasks before lm-eval's names have been cached.
"""

import difflib
import fnmatch
import importlib.util
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import xxhash

from lightlm.errors import UsageError
from lightlm.evaluate.results.board import ARITHMARK, BOARD, PARTS
from lightlm.evaluate.settings import Settings
from lightlm.files import cache_folder


@dataclass(frozen=True)
class Selection:
    """Tasks under one name. Args: optional: those that are left out, with a note, if their data cannot be read."""

    tasks: tuple[str, ...]
    optional: frozenset[str]


HELDOUT, CLOZE = "heldout", "heldout_cloze"
_BESIDE_BOARD = ("blimp_ties", "lambada_openai", HELDOUT)  # what the index does not show: language, not arithmetic
SELECTIONS = {
    BOARD: Selection(tuple(PARTS), frozenset([ARITHMARK])),
    "small_lm": Selection((*PARTS, *_BESIDE_BOARD), frozenset([ARITHMARK, *_BESIDE_BOARD])),
}

TASKS = Path(__file__).parent / "yaml"  # ours, for lm-eval's TaskManager(include_path=...)
OURS = frozenset([*(path.stem for path in TASKS.glob("*.yaml")), *SELECTIONS])
SELF_CONTAINED = frozenset([HELDOUT, CLOZE, ARITHMARK])  # those of ours that use none of lm-eval's tasks
DATA_DIR_VARIABLE = "LIGHTLM_EVAL_DATA"


def check(settings: Settings) -> None:
    """Raise UsageError for a task that lm-eval does not have, or a folder that does not exist."""
    find_data_dir(settings.data_dir)
    if settings.include_path is not None:
        task_files(Path(settings.include_path))  # any name may be among these
    else:
        check_names(settings.tasks)


def check_names(names: Sequence[str]) -> None:
    """Raise UsageError for a name that matches no task, if lm-eval's names are cached."""
    if OURS.issuperset(names):
        return
    spec = importlib.util.find_spec("lm_eval")  # does not import it
    if spec is None or spec.origin is None:
        return
    try:
        cached = cache_file(Path(spec.origin).parent / "tasks", metadata.version("lm_eval"))
        known = OURS.union(row[0] for row in json.loads(cached.read_text(encoding="utf-8")))
    except (OSError, ValueError, IndexError, TypeError):
        return
    for name in names:
        if name not in known and not Path(name).is_file() and not any(fnmatch.fnmatch(task, name) for task in known):
            raise unknown_task(name, known)


def unknown_task(name: str, known: Collection[str]) -> UsageError:
    """Return the error for a name that no task has."""
    near = difflib.get_close_matches(name, known, n=5) or sorted(task for task in known if name in task)[:5]
    hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
    return UsageError(f"lm-eval has no task '{name}'; {hint}")


def cache_file(root: Path, version: str) -> Path:
    """Return the file with the names of lm-eval's own tasks, which `index.stock_tasks` writes.

    Args:
        root: lm-eval's folder `tasks`.
        version: lm-eval's.
    """
    installed = f"{root}\0{version}\0{root.stat().st_mtime_ns}"
    return cache_folder() / f"tasks-{xxhash.xxh3_64_hexdigest(installed.encode())}.json"


def task_files(folder: Path) -> list[Path]:
    """Return the YAML files of a folder with tasks; raise UsageError if there are none."""
    if paths := sorted(folder.glob("**/*.yaml")):
        return paths
    raise UsageError(f"--include-path {folder} is not a folder with lm-eval tasks: no .yaml file in it or below")


def find_data_dir(given: str | Path | None) -> Path | None:
    """Return the given folder, or that of LIGHTLM_EVAL_DATA; None if neither is set. Raises UsageError if missing."""
    value = given or os.environ.get(DATA_DIR_VARIABLE)
    if value and not Path(value).is_dir():
        raise UsageError(
            f"{value} is not a folder; --data-dir, eval.data_dir and {DATA_DIR_VARIABLE} name one with data sets by "
            f"their names on the Hub, such as {Path(value) / 'Rowan' / 'hellaswag'}. "
            f"`lightlm eval --prefetch TASKS --data-dir {value}` makes it"
        )
    return Path(value) if value else None
