"""Where text comes from: the embedded pydocs, data sets on the Hugging Face Hub, local files and folders."""

import difflib
import functools
import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import xxhash

from lightlm.data.readers.files import PLAIN, SUFFIXES, file_units, suffix_of
from lightlm.data.readers.texts import Unit
from lightlm.data.select.filters import Filter
from lightlm.data.sources.hub.names import HUB_DATASETS, parse_hub
from lightlm.data.sources.hub.source import HubSource
from lightlm.errors import DataError

PYDOCS = "pydocs"


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


@runtime_checkable
class Revisable(Protocol):
    """A source that can be read in the state in which an earlier process began to read it."""

    def at_revision(self, revision: str) -> Source: ...


def open_source(spec: str, text_column: str = "text", chosen: Filter | None = None) -> Source:
    """The source that `spec` names: `pydocs`, a name in `HUB_DATASETS`, `hf:org/name[:config]`, a file, folder or glob.

    Only records that `chosen` keeps are read. Nothing is read yet, and the network is not used.
    Raises DataError for a path or a name that does not exist, or has no columns for `chosen` to judge by.
    """
    if spec == PYDOCS:
        if chosen is not None:
            raise DataError(f'--filter "{chosen.text}": {PYDOCS} has no columns to judge by')
        return PydocsSource()
    request = parse_hub(spec, text_column, chosen)
    if request is not None:
        return HubSource(request)
    path = Path(spec).expanduser()
    if path.exists() or glob.has_magic(spec):
        return LocalSource(path, text_column, chosen)
    raise _unknown(spec)


@dataclass(frozen=True)
class PydocsSource:
    """The documentation on this machine; see `lightlm.data.sources.pydocs`."""

    name: str = PYDOCS
    spec: str = PYDOCS
    description: str = "documentation of the Python standard library, torch and numpy on this machine"

    @property
    def fingerprint(self) -> str:
        return self.revision

    @property
    def revision(self) -> str:
        from lightlm.data.sources.pydocs import pydocs_revision

        return pydocs_revision()

    def units(self) -> Iterator[Unit]:
        yield Unit(PYDOCS, _pydocs)


@functools.cache
def _cached_pydocs() -> tuple[str, ...]:
    """Parsing 70 MB of source takes half a minute, and a tokenizer trained on the text reads it a second time."""
    from lightlm.data.sources.pydocs import pydocs_documents

    return tuple(pydocs_documents())


def _pydocs() -> Iterator[str]:
    yield from _cached_pydocs()


class LocalSource:
    """One file, or every supported file below a folder or that a glob matches, sorted by path.

    Hidden files and folders are left out.
    """

    def __init__(self, path: Path, text_column: str, chosen: Filter | None = None) -> None:
        """Raises DataError where no file at `path` can be read, or one has no columns for `chosen` to judge by."""
        root, self._pattern = (path, "**/*") if path.exists() else _split_glob(path)
        self._root = root.resolve()
        self._column, self._chosen = text_column, chosen
        self._files = self._find_files(path)
        self.name = _stem(self._root) or "data"
        self.spec = str(self._root if path.exists() else self._root / self._pattern)
        self.description = f"{len(self._files)} file{'s' * (len(self._files) != 1)} under {path}"
        self.revision = self.fingerprint = self._listing_hash()
        self.size = sum(path.stat().st_size for path in self._files)

    def _find_files(self, given: Path) -> list[Path]:
        supported = ", ".join(SUFFIXES)
        if self._root.is_file():
            if suffix_of(self._root) is None:
                raise DataError(f"{given}: this kind of file cannot be read; supported are {supported}")
            files = [self._root]
        else:
            found = {path for path in self._root.glob(self._pattern) if path.is_file() and suffix_of(path) is not None}
            visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(self._root).parts)]
            if not visible:
                place = "in this folder" if given.exists() else "that this pattern matches"
                raise DataError(f"{given}: no file {place} can be read; supported are {supported}")
            files = sorted(visible, key=self._relative)
        for path in files:
            if not str(path).isascii():
                _check_name(path)
        plain = [path for path in files if suffix_of(path) in PLAIN]
        if plain and self._chosen is not None:
            raise DataError(f'--filter "{self._chosen.text}": {plain[0]} is plain text, without columns to judge by')
        return files

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
            yield from file_units(path, self._relative(path), self._column, self._chosen)


def _split_glob(path: Path) -> tuple[Path, str]:
    """A pattern as the folder before its first wildcard, and the rest."""
    fixed = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
    return Path(*path.parts[:fixed]), "/".join(path.parts[fixed:])


def _check_name(path: Path) -> None:
    """Raises DataError for a name that is no text: manifests and messages could not hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!r}: this file's name is not UTF-8. Rename it") from None


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
