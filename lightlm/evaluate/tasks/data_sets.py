"""Data sets of tasks, from a folder, the Hub's cache or the Hub.

lm-eval calls `datasets.load_dataset` with each data set's name on the Hub. While tasks load, `DataSets.load` replaces
that function. It looks into a folder first and keeps what it has read. The tasks' configurations do not change, so
results name the same data sets wherever these came from.
"""

import contextlib
import copy
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
from datasets import load_dataset
from huggingface_hub import constants

from lightlm.data.sources.hub.client import first_line, hub_errors
from lightlm.errors import DataError, UsageError
from lightlm.evaluate.tasks.needs import Need

DATA_DIR_VARIABLE = "LIGHTLM_EVAL_DATA"
RECORD = ".prefetched.json"  # in a data set's folder: the commit of each fetched configuration
_FORMATS = {"json", "csv", "parquet", "text", "arrow", "xml", "imagefolder", "audiofolder", "webdataset"}


def find_data_dir(given: str | Path | None) -> Path | None:
    """Return the folder of `--data-dir` or LIGHTLM_EVAL_DATA, None if neither is set. Raises UsageError if missing."""
    source = "--data-dir" if given else DATA_DIR_VARIABLE
    value = given or os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        return None
    if not Path(value).is_dir():
        raise UsageError(
            f"{source} {value} is not a folder; give one with data sets by their names on the Hub, such as "
            f"{Path(value) / 'Rowan' / 'hellaswag'}. `lightlm eval --prefetch TASKS --data-dir {value}` makes it"
        )
    return Path(value)


def commits_in(place: Path) -> dict[str, str]:
    """Return the Hub's commit of each configuration fetched to this folder; empty if nothing was fetched."""
    try:
        commits = json.loads((place / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return commits if isinstance(commits, dict) else {}


class DataSets:
    """Data sets by the names that tasks use, each read once.

    Args:
        folder: laid out like the Hub, `folder/Rowan/hellaswag/<files>`; other data sets come from the cache or the Hub.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._loaded: dict[str, Any] = {}
        self._origins: dict[str, dict[str, str | None]] = {}

    def local(self, path: str) -> Path | None:
        """Return a data set's place in the folder, None if it is not there."""
        place = self.folder / path if self.folder is not None else None
        return place if place is not None and place.is_dir() else None

    def is_local(self, need: Need) -> bool:
        """Whether it can be read without the cache and the Hub."""
        return self.local(need.path) is not None or Path(need.path).is_dir() or _reads_files(need)

    def load(self, path: str, name: str | None = None, *more: Any, **options: Any) -> Any:
        """Load a data set like `datasets.load_dataset`."""
        key = repr((path, name, more, sorted(options.items())))
        if key not in self._loaded:
            place = self.local(path)
            found = load_dataset(str(place.resolve()) if place else path, name, *more, **options)
            self._loaded[key] = found
            self._origins[f"{path} ({name})" if name else path] = _origin(found, path, name, place)
        return copy.copy(self._loaded[key])  # a task may replace a split

    def origins(self) -> dict[str, dict[str, str | None]]:
        """Return by data set read so far: `from` (a folder, `files` or `hub`) and the Hub's `revision` if known."""
        return dict(sorted(self._origins.items()))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Replace `datasets.load_dataset` for all callers."""
        with mock.patch.object(datasets, "load_dataset", self.load):
            yield

    def missing(self, needs: Iterable[Need]) -> list[tuple[Need, str]]:
        """Return the needs that cannot be read, with reasons; keep the others for `load`."""
        found = []
        for need in needs:
            try:
                self.load(need.path, need.name, **need.options)
            except hub_errors() as error:
                found.append((need, first_line(error)))
        return found


def _origin(found: Any, path: str, name: str | None, place: Path | None) -> dict[str, str | None]:
    if place is not None or Path(path).is_dir():
        folder = place or Path(path)
        return {"from": str(folder), "revision": commits_in(folder).get(name or "default")}
    if path in _FORMATS:
        return {"from": "files", "revision": None}
    split = next(iter(found.values()), None) if isinstance(found, dict) else found
    # The cache names the folder of a data set by its commit on the Hub.
    names = [Path(file["filename"]).parent.name for file in getattr(split, "cache_files", [])[:1]]
    return {"from": "hub", "revision": next((name for name in names if re.fullmatch(r"[0-9a-f]{40}", name)), None)}


def _reads_files(need: Need) -> bool:
    """Whether a need names files on this machine, as tasks on the user's own data do."""
    files = need.options.get("data_files")
    named = files.values() if isinstance(files, dict) else [files]
    listed = [item for entry in named for item in (entry if isinstance(entry, list) else [entry])]
    return need.path in _FORMATS and all(isinstance(item, str) and "://" not in item for item in listed)


def unreadable(
    missing: list[tuple[Need, str]], tasks: str, include_path: str | None = None, folder: Path | None = None
) -> DataError:
    """Return the error for missing data sets: each with its tasks and reason, then how to fetch them.

    Args:
        tasks, include_path: as given on the command line.
        folder: the data folder in use.
    """
    missing = [(need, _reason(reason)) for need, reason in missing]
    reasons = {reason for _, reason in missing}
    width = max(len(need.title) for need, _ in missing)
    head = f"{len(missing)} data sets cannot be read" if len(missing) > 1 else "a data set cannot be read"
    head += f" and are not in {folder}" if folder is not None else ""
    lines = [head + (f" ({reasons.pop()}):" if len(reasons) == 1 else ":")]
    for need, reason in missing:
        names = ", ".join(need.tasks[:5]) + (f" and {len(need.tasks) - 5} more" if len(need.tasks) > 5 else "")
        lines.append(f"  {need.title:<{width}}  for {names}" + (f": {reason}" if reasons else ""))
    if all(_reads_files(need) for need, _ in missing):
        return DataError("\n".join(lines))
    place = shlex.quote(str(folder)) if folder is not None else "DIR"
    command = f"  lightlm eval --prefetch {shlex.quote(tasks)}"
    command += f" --include-path {shlex.quote(include_path)}" if include_path else ""
    lines += [
        "With a connection, fetch them once into the Hub's cache, then set HF_HUB_OFFLINE=1:",
        command,
        f"or fetch them into a folder, then give --data-dir {place} or set {DATA_DIR_VARIABLE}={place}:",
        f"{command} --data-dir {place}",
        "The task heldout needs no download.",
    ]
    return DataError("\n".join(lines))


def _reason(reason: str) -> str:
    """Return the library's reason, or a clearer one if it was in offline mode."""
    if "OfflineModeIsEnabled" not in reason:
        return reason
    # The user's setting: the `offline` context, which LightLM itself enters, has ended.
    cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no answer from {constants.ENDPOINT}"
    return f"{cause}, and it is not in the cache"
