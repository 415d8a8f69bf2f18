"""The data sets that tasks read: which they are, and where each is found.

lm-eval asks `datasets.load_dataset` for each task's set by its name on the Hub. While tasks are loaded, `DataSets.load`
answers in its place: a folder of that name comes before the cache and the Hub, and what was read once is kept. The
configurations of tasks stay untouched, so results name the same data sets wherever they came from.
"""

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
from datasets import load_dataset
from huggingface_hub import constants
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager, _factory

from lightlm.data.hub import first_line, hub_errors
from lightlm.errors import DataError, UsageError

DATA_DIR_VARIABLE = "LIGHTLM_EVAL_DATA"
RECORD = ".prefetched.json"  # in the folder of a data set: the commit of each configuration that was fetched
_FORMATS = {"json", "csv", "parquet", "text", "arrow", "xml", "imagefolder", "audiofolder", "webdataset"}


@dataclass(frozen=True)
class Need:
    """A data set that tasks read, as they name it.

    Args:
        path: a Hub id, or a format of `datasets` such as `json`.
        name: the configuration.
        options: further arguments of `load_dataset`.
        tasks: who reads it.
    """

    path: str
    name: str | None
    options: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """`allenai/ai2_arc (ARC-Easy)`."""
        return f"{self.path} ({self.name})" if self.name else self.path


def find_data_dir(given: str | Path | None) -> Path | None:
    """The folder of `--data-dir`, or of the environment's LIGHTLM_EVAL_DATA. Raises UsageError where there is none."""
    source = "--data-dir" if given else DATA_DIR_VARIABLE
    value = given or os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        return None
    if not Path(value).is_dir():
        raise UsageError(
            f"{source} {value} is no folder; it should hold data sets by their names on the Hub, such as "
            f"{Path(value) / 'Rowan' / 'hellaswag'} (`lightlm eval --prefetch TASKS --data-dir {value}` fills it)"
        )
    return Path(value)


def commits_in(place: Path) -> dict[str, str]:
    """The Hub's commit of each configuration that was fetched to this folder; empty for one that was put there."""
    try:
        commits = json.loads((place / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return commits if isinstance(commits, dict) else {}


class DataSets:
    """Data sets by the names that tasks give them, each read once.

    Args:
        folder: laid out like the Hub, `folder/Rowan/hellaswag/<files>`; what is not there comes from the cache or the
            Hub.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._loaded: dict[str, Any] = {}
        self._origins: dict[str, dict[str, str | None]] = {}

    def local(self, path: str) -> Path | None:
        """Where a data set lies in the folder."""
        place = self.folder / path if self.folder is not None else None
        return place if place is not None and place.is_dir() else None

    def is_local(self, need: Need) -> bool:
        """Whether reading it takes neither the cache nor the Hub."""
        return self.local(need.path) is not None or Path(need.path).is_dir() or _reads_files(need)

    def load(self, path: str, name: str | None = None, *more: Any, **options: Any) -> Any:
        """`datasets.load_dataset`."""
        key = repr((path, name, more, sorted(options.items())))
        if key not in self._loaded:
            place = self.local(path)
            found = load_dataset(str(place.resolve()) if place else path, name, *more, **options)
            self._loaded[key] = found
            self._origins[f"{path} ({name})" if name else path] = _origin(found, path, name, place)
        return copy.copy(self._loaded[key])  # a task may replace a split in its own

    def origins(self) -> dict[str, dict[str, str | None]]:
        """For each data set that was read, `from` (a folder, `files` or `hub`) and the Hub's `revision` if known."""
        return dict(sorted(self._origins.items()))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Answer for `datasets.load_dataset`, whoever calls it."""
        with mock.patch.object(datasets, "load_dataset", self.load):
            yield

    def missing(self, needs: Iterable[Need]) -> list[tuple[Need, str]]:
        """Those that cannot be read, and why; the others are kept for `load`."""
        found = []
        for need in needs:
            try:
                self.load(need.path, need.name, **need.options)
            except hub_errors() as error:
                found.append((need, _reason(error)))
        return found


def _origin(found: Any, path: str, name: str | None, place: Path | None) -> dict[str, str | None]:
    if place is not None or Path(path).is_dir():
        folder = place or Path(path)
        return {"from": str(folder), "revision": commits_in(folder).get(name or "default")}
    if path in _FORMATS:
        return {"from": "files", "revision": None}
    split = next(iter(found.values()), None) if isinstance(found, dict) else found
    # The cache's folder of a data set from the Hub bears the commit's name.
    names = [Path(file["filename"]).parent.name for file in getattr(split, "cache_files", [])[:1]]
    return {"from": "hub", "revision": next((name for name in names if re.fullmatch(r"[0-9a-f]{40}", name)), None)}


def _reads_files(need: Need) -> bool:
    """Whether a need names files of this machine, as a task on the user's own data does."""
    files = need.options.get("data_files")
    named = files.values() if isinstance(files, dict) else [files]
    listed = [item for entry in named for item in (entry if isinstance(entry, list) else [entry])]
    return need.path in _FORMATS and all(isinstance(item, str) and "://" not in item for item in listed)


class _Described(ConfigurableTask):
    """A task that has read its configuration and nothing else."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.source = config.pop("class", None)
        self._config = TaskConfig(**config)


class _Describer(_factory.TaskFactory):
    """lm-eval's factory, which stops before any data is loaded."""

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Task:
        config = self._load_full_config(entry, overrides)
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        known = TaskConfig.__dataclass_fields__.keys() | {"class"}  # tasks in Python may have keys of their own
        return _Described({key: value for key, value in config.items() if key in known})


def needs_of(manager: TaskManager, names: list[str], metadata: dict[str, Any]) -> list[Need]:
    """The data sets of tasks, groups and tags, each once; nothing is loaded for it.

    Not among them are those that a task fetches by code of its own.
    """
    needs: dict[str, Need] = {}
    before = manager._factory
    manager._factory = _Describer(meta=metadata)
    try:
        # A group builds the tasks that are written out in its own file by the class's name.
        with mock.patch.object(_factory, "ConfigurableTask", _Described):
            tasks = TaskManager.load(manager, names)["tasks"]
    finally:
        manager._factory = before
    for task_name, task in tasks.items():
        need = _need(task)
        if need is not None:
            key = repr((need.path, need.name, sorted(need.options.items())))
            needs.setdefault(key, need).tasks.append(task_name)
    return list(needs.values())


def _need(task: Any) -> Need | None:
    config, source = task.config, task.source
    if config.custom_dataset is not None:
        return None
    if source is not None and source.download not in (Task.download, ConfigurableTask.download):
        return None
    path = config.dataset_path or getattr(source, "DATASET_PATH", None)
    if path is None:
        return None
    # lm-eval's own `download` drops this argument, which `datasets` no longer takes.
    options = {key: value for key, value in (config.dataset_kwargs or {}).items() if key != "trust_remote_code"}
    return Need(path, config.dataset_name or getattr(source, "DATASET_NAME", None), options)


def unreadable(
    missing: list[tuple[Need, str]], tasks: str, include_path: str | None = None, folder: Path | None = None
) -> DataError:
    """What a user who lacks data sets is told: each of them, the tasks that need it, why, and how to get them.

    Args:
        tasks: what was asked for, as it stood on the command line, and so
        include_path.
        folder: the data folder in use.
    """
    reasons = {reason for _, reason in missing}
    width = max(len(need.title) for need, _ in missing)
    head = f"{len(missing)} data sets cannot be read" if len(missing) > 1 else "a data set cannot be read"
    head += f", and {folder} does not hold {'them' if len(missing) > 1 else 'it'}" if folder is not None else ""
    lines = [head + (f" ({reasons.pop()}):" if len(reasons) == 1 else ":")]
    for need, reason in missing:
        names = ", ".join(need.tasks[:5]) + (f" and {len(need.tasks) - 5} more" if len(need.tasks) > 5 else "")
        lines.append(f"  {need.title:<{width}}  for {names}" + (f": {reason}" if reasons else ""))
    place = folder or "DIR"
    command = f"  lightlm eval --prefetch {tasks}" + (f" --include-path {include_path}" if include_path else "")
    lines += [
        "Where there is a connection, fetch them once into the Hub's cache, and use them with HF_HUB_OFFLINE=1:",
        command,
        f"or into a folder to take along, and use them with {DATA_DIR_VARIABLE}={place} (or eval's --data-dir {place}):",
        f"{command} --data-dir {place}",
        "The task heldout needs nothing from outside.",
    ]
    return DataError("\n".join(lines))


def _reason(error: BaseException) -> str:
    reason = first_line(error)
    if not constants.HF_HUB_OFFLINE or "OfflineModeIsEnabled" not in reason:
        return reason
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set, and the cache does not hold it"
    return f"no answer from {constants.ENDPOINT}, and the cache does not hold it"  # our doing: see `offline`
