"""The names of tasks: lm-eval's own from a cached index, and the check of a user's folder.

To learn its own task names, lm-eval parses 14,000 YAML files at every start, which takes 4.5 s on a two-core machine.
The cached index takes 0.1 s.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import lm_eval
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from lightlm import files
from lightlm.errors import UsageError
from lightlm.evaluate.tasks.references import cache_file, task_files
from lightlm.names import warn

ROOT = Path(lm_eval.__file__).parent / "tasks"


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
    """Return lm-eval's own tasks, groups and tags by name, from a file per installed version of lm-eval.

    The entries lack the tasks' configurations, which lm-eval reads again from the file when it builds a task.
    """
    cached = cache_file(ROOT, lm_eval.__version__)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {
            name: Entry(name, Kind[kind], path and Path(path), tags=set(tags))
            for name, kind, path, tags in json.loads(cached.read_text(encoding="utf-8"))
        }
    index: dict[str, Entry] = TaskIndex.build([ROOT])
    rows = [[e.name, e.kind.name, e.yaml_path and str(e.yaml_path), sorted(e.tags)] for e in index.values()]
    with contextlib.suppress(OSError):  # without a writable home the next start parses the files again
        cached.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(cached, json.dumps(rows))
    return index


def check_tasks_folder(folder: Path) -> Path:
    """Return the folder if all YAML files in it can be read; lm-eval silently skips those that cannot.

    Raises:
        UsageError: it is not a folder, holds no YAML file, or holds one that is damaged or includes a missing file.
    """
    for path in task_files(folder):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # from the YAML library, the system, or lm-eval
            reason = " ".join(str(error).split())
            raise UsageError(f"--include-path {folder}: {path} cannot be read: {reason}") from None
    return folder
