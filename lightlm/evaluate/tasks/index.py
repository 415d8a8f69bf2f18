"""The names of tasks: lm-eval's own from a cached index, and the check of a user's folder.

To learn its own task names, lm-eval parses 14,000 YAML files at every start, which takes 4.5 s on a two-core machine.
The cached index takes 0.1 s. It is valid until the time or size of one of the files changes.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import lm_eval
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from lightlm import files
from lightlm.errors import UsageError

ROOT = Path(lm_eval.__file__).parent / "tasks"
warn = logging.getLogger("lightlm").warning


@contextlib.contextmanager
def index_from_cache(include_stock: bool) -> Iterator[None]:
    """Make lm-eval's TaskManager take its own tasks from the cached index, and warn about tasks that replace them."""
    build, stock = TaskIndex.build, stock_tasks() if include_stock else {}

    def build_cached(paths: list[Path]) -> dict[str, Entry]:
        added: dict[str, Entry] = build([path for path in paths if path != ROOT])
        if replaced := sorted(name for name in added if name in stock and added[name].kind is not Kind.TAG):
            warn(f"{paths[-1]}: {', '.join(replaced)} replace lm-eval's tasks of the same name")
        return stock | added

    with mock.patch.object(TaskIndex, "build", staticmethod(build_cached)):
        yield


def stock_tasks() -> dict[str, Entry]:
    """Return lm-eval's own tasks, groups and tags by name.

    The entries lack the tasks' configurations, which lm-eval reads again from the file when it builds a task.
    """
    cached = _cache_file()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {
            name: Entry(name, Kind[kind], None if path is None else Path(path), tags=set(tags))
            for name, kind, path, tags in json.loads(cached.read_text(encoding="utf-8"))
        }
    index: dict[str, Entry] = TaskIndex.build([ROOT])
    rows = [
        [name, entry.kind.name, None if entry.yaml_path is None else str(entry.yaml_path), sorted(entry.tags)]
        for name, entry in index.items()
    ]
    with contextlib.suppress(OSError):  # without a writable home the next start parses the files again
        cached.parent.mkdir(parents=True, exist_ok=True)
        for old in cached.parent.glob("tasks-*.json"):
            old.unlink()
        files.write_text(cached, json.dumps(rows))
    return index


def _cache_file() -> Path:
    """Return a file in the user's cache folder whose name changes when any of lm-eval's task files does."""
    digest = hashlib.sha256("".join([str(ROOT), *sorted(_stamps(str(ROOT)))]).encode())
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
    """Return the folder if all YAML files in it can be read; lm-eval silently skips those that cannot.

    Raises:
        UsageError: it is not a folder, holds no YAML file, or holds one that is damaged or includes a missing file.
    """
    if not folder.is_dir():
        raise UsageError(f"--include-path {folder} is not a folder; give a folder with the YAML files of lm-eval tasks")
    paths = sorted(folder.glob("**/*.yaml"))
    if not paths:
        raise UsageError(f"--include-path {folder} contains no task: no .yaml file in it or below")
    for path in paths:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # from the YAML library, the system, or lm-eval
            reason = " ".join(str(error).split())
            raise UsageError(f"--include-path {folder}: {path} cannot be read: {reason}") from None
    return folder
