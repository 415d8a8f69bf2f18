"""Data sets of tasks, from a folder, the Hub's cache or the Hub.

lm-eval calls `datasets.load_dataset` with each data set's name on the Hub. While tasks load, `DataSets.load` replaces
that function. It looks into a folder first and keeps what it has read. The tasks' configurations do not change, so
results name the same data sets wherever these came from.
"""

import contextlib
import copy
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import xxhash
from datasets import load_dataset
from huggingface_hub import constants

from lightlm.errors import DataError
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks.references import DATA_DIR_VARIABLE

RECORD = ".prefetched.json"  # in a data set's folder: the commit of each fetched configuration
_FORMATS = {"json", "csv", "parquet", "text", "arrow", "xml", "imagefolder", "audiofolder", "webdataset"}


def commits_in(place: Path) -> dict[str, str]:
    """Return the Hub's commit of each configuration fetched to this folder; empty if nothing was fetched."""
    try:
        commits: dict[str, str] = json.loads((place / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return commits


def _cache_of(place: Path) -> str:
    """Return the folder in which `datasets` keeps what it has read from a folder, as it is now.

    datasets 5.2 names it by the text of README.md, so it takes rows of a file that has changed since, or of another
    folder with the same README.md.
    """
    files = [(str(file.resolve()), file.stat()) for file in sorted(place.rglob("*")) if file.is_file()]
    state = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / xxhash.xxh3_64_hexdigest(state.encode()))


@dataclass(frozen=True)
class Need:
    """A data set that tasks read.

    Args:
        path: a Hub id, or a format of `datasets` such as `json`.
        name: the configuration.
        options: further arguments of `load_dataset`.
        tasks: names of the tasks.
    """

    path: str
    name: str | None
    options: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """`allenai/ai2_arc (ARC-Easy)`."""
        return f"{self.path} ({self.name})" if self.name else self.path

    @property
    def reads_files(self) -> bool:
        """Whether it names files on this machine, as tasks on the user's own data do."""
        return self.path in _FORMATS and "://" not in str(self.options.get("data_files", "://"))


class DataSets:
    """Data sets by the names that tasks use, each read once.

    Args:
        folder: laid out like the Hub, `folder/Rowan/hellaswag/<files>`; other data sets come from the cache or the Hub.

    Attributes:
        origins: by data set read so far, `from` (a folder, `files` or `hub`) and the Hub's `revision` if known.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._loaded: dict[str, Any] = {}
        self.origins: dict[str, dict[str, str | None]] = {}

    def local(self, path: str) -> Path | None:
        """Return a data set's place in the folder or in the working directory, None if it is not there."""
        places = [Path(path)] if self.folder is None else [self.folder / path, Path(path)]
        return next((place for place in places if place.is_dir() and path not in _FORMATS), None)

    def is_local(self, need: Need) -> bool:
        """Return whether it can be read without the cache and the Hub."""
        return self.local(need.path) is not None or need.reads_files

    def load(self, path: str, name: str | None = None, *more: Any, **options: Any) -> Any:
        """Load a data set like `datasets.load_dataset`."""
        key = repr((path, name, more, sorted(options.items())))
        if key not in self._loaded:
            place = self.local(path)
            where = {"cache_dir": _cache_of(place)} if place else {}
            try:
                found = load_dataset(str(place.resolve()) if place else path, name, *more, **where | options)
            except StopIteration as error:  # how `datasets` meets a file without a row
                files = f": {options['data_files']}" if "data_files" in options else ""
                raise ValueError(f"it holds no documents{files}") from error
            self._loaded[key] = found
            origin, revision = "files" if path in _FORMATS else "hub", None
            if place:
                origin, revision = str(place), commits_in(place).get(name or "default")
            elif origin == "hub":
                split = next(iter(found.values()), None) if isinstance(found, dict) else found
                # The cache names the folder of a data set by its commit on the Hub.
                folders = [Path(file["filename"]).parent.name for file in getattr(split, "cache_files", [])[:1]]
                revision = next((folder for folder in folders if re.fullmatch(r"[0-9a-f]{40}", folder)), None)
            self.origins[f"{path} ({name})" if name else path] = {"from": origin, "revision": revision}
        return copy.copy(self._loaded[key])  # a task may replace a split

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Replace `datasets.load_dataset` for all callers."""
        with mock.patch.object(datasets, "load_dataset", self.load):
            yield


def why_missing(reason: str) -> str:
    """Return the reason why a data set cannot be read, in words for users."""
    if "OfflineModeIsEnabled" not in reason:
        return reason
    # The user's setting: the `offline` context, which LightLM itself enters, has ended.
    cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no answer from {constants.ENDPOINT}"
    return f"{cause}, and it is not in the cache"


def fetch_command(settings: Settings, folder: Path | str | None = None) -> str:
    """Return the command that fetches the data of these tasks, into a folder or the Hub's cache."""
    command = f"lightlm eval --prefetch {shlex.quote(','.join(settings.tasks))}"
    command += f" --include-path {shlex.quote(settings.include_path)}" if settings.include_path else ""
    return command + (f" --data-dir {shlex.quote(str(folder))}" if folder else "")


def unreadable(missing: list[tuple[Need, str]], settings: Settings, folder: Path | None) -> DataError:
    """Return the error for missing data sets: each with its tasks and reason, then how to fetch them into a cache."""
    head = "a data set cannot be read" if len(missing) == 1 else f"{len(missing)} data sets cannot be read"
    lines = [head + (f", not even from {folder}:" if folder else ":")]
    for need, reason in missing:
        lines.append(f"  {need.title}  for {', '.join(need.tasks)}: {why_missing(reason)}")
    place = shlex.quote(str(folder or "DIR"))
    advice = [
        "With a connection, fetch them once into the Hub's cache, then set HF_HUB_OFFLINE=1:",
        f"  {fetch_command(settings)}",
        f"or fetch them into a folder, then give --data-dir {place} or set {DATA_DIR_VARIABLE}={place}:",
        f"  {fetch_command(settings, folder or 'DIR')}",
        "The task heldout needs no download.",
    ]
    return DataError("\n".join(lines if all(need.reads_files for need, _ in missing) else lines + advice))
