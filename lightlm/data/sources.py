"""Where text comes from: the embedded pydocs, data sets on the Hugging Face Hub, local files and folders."""

import difflib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import xxhash

from lightlm.data.readers import SUFFIXES, file_units, missing_column, suffix_of
from lightlm.data.texts import Unit
from lightlm.errors import DataError

# Name -> (Hub repository, configuration). Later names go here.
HUB_DATASETS: dict[str, tuple[str, str | None]] = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "tinystories": ("roneneldan/TinyStories", None),
}
PYDOCS = "pydocs"
OFFLINE_HINT = (
    "What works offline: `lightlm prepare-data pydocs`, and local files or folders (`lightlm prepare-data PATH`)."
)


class Source(Protocol):
    """A collection of text documents in a fixed order, read unit by unit."""

    @property
    def name(self) -> str:
        """The data folder's default name."""

    @property
    def spec(self) -> str:
        """What the user asked for, in a form that does not depend on the working directory."""

    @property
    def description(self) -> str:
        """One line for people."""

    @property
    def fingerprint(self) -> str | None:
        """Changes when the content does; None where only the network could tell."""

    @property
    def revision(self) -> str | None:
        """Which state of the source was read: a Hub commit, package versions, or a hash of the files' listing."""

    def units(self) -> Iterator[Unit]:
        """The units in their order. Raises DataError where the source cannot be read."""


def open_source(spec: str, text_column: str = "text") -> Source:
    """The source that `spec` names: `pydocs`, a name in `HUB_DATASETS`, `hf:org/name[:config]`, a file or a folder.

    Nothing is read yet, and the network is not used. Raises DataError for a path or a name that does not exist.
    """
    if spec == PYDOCS:
        return PydocsSource()
    if spec in HUB_DATASETS:
        return HubSource(spec, *HUB_DATASETS[spec], text_column)
    if spec.startswith("hf:"):
        repo, _, config = spec.removeprefix("hf:").partition(":")
        if repo.count("/") != 1 or not all(repo.split("/")):
            raise DataError(
                f"{spec}: write a Hub data set as hf:organisation/name or hf:organisation/name:configuration"
            )
        name = repo.rpartition("/")[2]
        return HubSource(f"{name}-{config}" if config else name, repo, config or None, text_column)
    path = Path(spec).expanduser()
    if path.exists():
        return LocalSource(path, text_column)
    raise _unknown(spec)


@dataclass(frozen=True)
class PydocsSource:
    """The documentation on this machine; see `lightlm.data.pydocs`."""

    name: str = PYDOCS
    spec: str = PYDOCS
    description: str = "documentation of the Python standard library, torch and numpy on this machine"

    @property
    def fingerprint(self) -> str:
        return self.revision

    @property
    def revision(self) -> str:
        from lightlm.data.pydocs import pydocs_revision

        return pydocs_revision()

    def units(self) -> Iterator[Unit]:
        yield Unit(PYDOCS, _pydocs)


@functools.cache
def _cached_pydocs() -> tuple[str, ...]:
    """Parsing 70 MB of source takes half a minute, and a tokenizer trained on the text reads it a second time."""
    from lightlm.data.pydocs import pydocs_documents

    return tuple(pydocs_documents())


def _pydocs() -> Iterator[str]:
    yield from _cached_pydocs()


class LocalSource:
    """One file, or every supported file below a folder, sorted by path; hidden files and folders are left out."""

    def __init__(self, path: Path, text_column: str) -> None:
        """Raises DataError where no file at `path` can be read."""
        self._root = path.resolve()
        self._column = text_column
        self._files = self._find_files(path)
        self.name = _stem(self._root) or "data"
        self.spec = str(self._root)
        self.description = f"{len(self._files)} file{'s' * (len(self._files) != 1)} under {path}"
        self.revision = self.fingerprint = self._listing_hash()
        self.size = sum(path.stat().st_size for path in self._files)

    def _find_files(self, given: Path) -> list[Path]:
        supported = ", ".join(SUFFIXES)
        if self._root.is_file():
            if suffix_of(self._root) is None:
                raise DataError(f"{given}: this kind of file cannot be read; supported are {supported}")
            return [self._root]
        found = (path for path in self._root.rglob("*") if path.is_file() and suffix_of(path) is not None)
        visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(self._root).parts)]
        if not visible:
            raise DataError(f"{given}: no file in this folder can be read; supported are {supported}")
        return sorted(visible, key=self._relative)

    def _relative(self, path: Path) -> str:
        """The file's name in unit ids: relative to the folder, with forward slashes on every system."""
        return path.relative_to(self._root).as_posix() if path != self._root else path.name

    def _listing_hash(self) -> str:
        digest = xxhash.xxh3_64()
        for path in self._files:
            status = path.stat()
            digest.update(
                f"{self._relative(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
            )
        return f"files {digest.hexdigest()}"

    def units(self) -> Iterator[Unit]:
        for path in self._files:
            yield from file_units(path, self._relative(path), self._column)


class HubSource:
    """The train split of a Hub data set, streamed: one unit per file of the data set."""

    fingerprint = None

    def __init__(self, name: str, repo: str, config: str | None, text_column: str) -> None:
        self.name = name
        self.spec = f"hf:{repo}:{config}" if config else f"hf:{repo}"
        self.description = f"{self.spec.removeprefix('hf:')} on the Hugging Face Hub"
        self._repo, self._config, self._column = repo, config, text_column

    @functools.cached_property
    def revision(self) -> str | None:
        from lightlm.data.hub import dataset_revision, require_hub

        if not Path(self._repo).is_dir():
            require_hub(f"The data set {self._repo!r}", OFFLINE_HINT)
        return dataset_revision(self._repo)

    def units(self) -> Iterator[Unit]:
        from lightlm.data.hub import load_streaming

        dataset = load_streaming(self._repo, self._config, self.revision)
        if dataset.column_names is not None:
            if self._column not in dataset.column_names:
                raise missing_column(self._repo, self._column, dataset.column_names)
            dataset = dataset.select_columns([self._column])
        count = dataset.num_shards
        for index in range(count):
            shard = dataset.shard(num_shards=count, index=index)
            yield Unit(f"{self.spec}#{index}/{count}", partial(_read_hub, shard, self._repo, self._column))


def _read_hub(shard: Any, repo: str, text_column: str) -> Iterator[str]:
    from lightlm.data.hub import first_line, hub_errors, quiet_libraries

    with quiet_libraries():
        try:
            for row in shard:
                if text_column not in row:
                    raise missing_column(repo, text_column, list(row))
                text = row[text_column]
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise DataError(
                        f"{repo}: the column {text_column!r} holds {type(text).__name__}, not text. "
                        "Name the one with the text: --text-column NAME"
                    )
                yield text
        except hub_errors() as error:
            raise DataError(
                f"Reading {repo!r} from the Hub stopped: {first_line(error)}. Run the command again."
            ) from error


def _stem(path: Path) -> str:
    """A name without every supported suffix: `notes.jsonl.gz` is `notes`; a folder keeps its whole name."""
    suffix = suffix_of(path) if path.is_file() else None
    return path.name[: -len(suffix)] if suffix else path.name


def _unknown(spec: str) -> DataError:
    known = [PYDOCS, *HUB_DATASETS]
    if Path(spec).suffix or Path(spec).is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        return DataError(f"There is no file or folder {spec}.")
    if spec.count("/") == 1:
        return DataError(f"There is no file or folder {spec}. A data set on the Hugging Face Hub is written hf:{spec}")
    near = difflib.get_close_matches(spec, known, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]}?" if near else ""
    return DataError(
        f"There is no source {spec!r}, and no file or folder of that name.{guess} "
        f"Known names: {', '.join(known)}; or give a path, or hf:organisation/name."
    )
