"""The names of tasks: lm-eval's own, kept from one call to the next, and those of a user's folder.

lm-eval reads thousands of YAML files whenever it starts, only to learn which names there are, which takes seconds. The
list made of them is the same until a file changes, which their times and sizes tell.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import lm_eval
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from lightlm import files
from lightlm.errors import UsageError

ROOT = Path(lm_eval.__file__).parent / "tasks"


def stock_tasks() -> dict[str, Entry]:
    """lm-eval's own tasks, groups and tags by name, as its TaskIndex finds them."""
    kept = _cache_file()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return _read(json.loads(kept.read_text(encoding="utf-8")))
    index: dict[str, Entry] = TaskIndex.build([ROOT])
    rows = [
        [name, entry.kind.name, None if entry.yaml_path is None else str(entry.yaml_path), sorted(entry.tags)]
        for name, entry in index.items()
    ]
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time, nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        for old in kept.parent.glob("tasks-*.json"):
            old.unlink()
        files.write_text(kept, json.dumps(rows))
    return index


def _read(rows: list[list]) -> dict[str, Entry]:
    """The index without the tasks' configurations, which lm-eval reads again from the file when it builds a task."""
    return {
        name: Entry(name, Kind[kind], None if path is None else Path(path), tags=set(tags))
        for name, kind, path, tags in rows
    }


def _cache_file() -> Path:
    """A file whose name changes with any of lm-eval's; in the cache folder of the user."""
    digest = hashlib.sha256(str(ROOT).encode())
    for line in sorted(_stamps(str(ROOT))):
        digest.update(line.encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "lightlm" / f"tasks-{digest.hexdigest()[:16]}.json"


def _stamps(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _stamps(entry.path)
            elif entry.name.endswith(".yaml"):
                status = entry.stat()
                yield f"{entry.path}\0{status.st_mtime_ns}\0{status.st_size}\n"


def check_tasks_folder(folder: Path) -> Path:
    """The folder, if all YAML files in it can be read; lm-eval passes over those that cannot without a word.

    Raises:
        UsageError: it is no folder, holds no YAML file, or one that is damaged or includes a file that is not there.
    """
    if not folder.is_dir():
        raise UsageError(f"--include-path {folder} is no folder; it should hold the YAML files of lm-eval tasks")
    paths = sorted(folder.glob("**/*.yaml"))
    if not paths:
        raise UsageError(f"--include-path {folder} holds no task: there is no .yaml file in it or below")
    for path in paths:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of the YAML library, of the system, and lm-eval's own
            raise UsageError(
                f"--include-path {folder}: {path} cannot be read: {' '.join(str(error).split())}"
            ) from None
    return folder
