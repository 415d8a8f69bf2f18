"""Local files, folders and globs as a source."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePath

import xxhash

from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.readers.file import raise_machine_fault
from lightlm.data.readers.registry import SUPPORTED, reader_of, suffix_of
from lightlm.data.readers.texts import Unit, unreadable
from lightlm.data.select.filters import Filter
from lightlm.data.sources.base import ChangedError, FileCounts
from lightlm.data.sources.folder_walk import Entry, FolderWalk, fault_of, is_hidden, kind_of, most_common
from lightlm.errors import DataError


class LocalSource:
    """One file, or every supported file below a folder or that a glob matches, sorted by path.

    Hidden files and folders are left out. So are .json, .csv and .tsv files without the text column, unless the glob
    names their suffix.
    """

    def __init__(self, path: Path, text_column: str, row_filter: Filter | None = None) -> None:
        """Raises DataError where no file at `path` can be read, or one has no columns for `row_filter` to judge."""
        exists = path.exists()
        if not exists and path.is_symlink():
            raise _broken_link(path)
        if exists and not path.is_file() and not path.is_dir():
            raise DataError(f"{path} is a pipe or a device. Pipe the text instead: ... | lightlm prepare-data -")
        # A pattern is split into the folder before its first wildcard, and the rest.
        fixed = next((number for number, part in enumerate(path.parts) if glob.has_magic(part)), 0)
        self._root = _located(path) if exists else Path(*path.parts[:fixed]).resolve()
        self._pattern = None if exists else "/".join(path.parts[fixed:])
        self._column, self._row_filter = text_column, row_filter
        self._left_out: Counter[str] = Counter()
        self._unreadable: dict[Path, DataError] = {}
        self._linked = 0  # files behind links to folders
        self._files = self._find_files(path)
        suffix = suffix_of(self._root) if self._root.is_file() else None
        own_name = os.path.basename(os.path.abspath(path)) if exists and suffix is None else self._root.name
        self.name = (own_name[: -len(suffix)] if suffix else own_name) or "data"
        self.spec = str(self._root if exists else self._root / (self._pattern or ""))
        linked = f", {self._linked} of them in linked folders" if self._linked else ""
        self.description = f"{len(self._files)} file{'s' * (len(self._files) != 1)} under {path}{linked}"
        self.revision = self.fingerprint = self._listing_hash()
        self.size = sum(_status(path)[0] for path in self._files)
        read = Counter(suffix_of(path) or "" for path in self._files)
        self.file_counts = FileCounts(most_common(read), most_common(self._left_out))

    def _find_files(self, given: Path) -> list[Path]:
        if self._root.is_file():
            if suffix_of(self._root) is None:
                raise DataError(f"{given}: this kind of file cannot be read; supported are {SUPPORTED}")
            files = [self._root]
        else:
            files = sorted(self._readable(), key=self._relative)
            if not files and self._unreadable:
                raise next(iter(self._unreadable.values()))
            if not files:
                place = "in this folder" if given.exists() else "that this pattern matches"
                found = ", ".join(f"{count:,} {kind}" for kind, count in most_common(self._left_out).items())
                holds = f" (found: {found})" if found else ""
                raise DataError(f"{given}: no file {place} can be read{holds}; supported are {SUPPORTED}")
        unreadable = next((path for path in files if re.search("[\udc80-\udcff]", str(path))), None)
        if unreadable is not None:  # manifests and messages cannot hold it
            raise DataError(f"{str(unreadable)!r}: this file's name is not UTF-8. Rename it")
        plain = next((path for path in files if not reader_of(path).has_columns), None)
        if plain is not None and self._row_filter is not None:
            raise DataError(f'--filter "{self._row_filter.text}": {plain} is plain text, without columns to judge')
        return files

    def _readable(self) -> list[Path]:
        """Return the files to read; count the others."""
        files: list[Path] = []
        without_column: list[Path] = []
        for path, linked in self._entries():
            reader = reader_of(path) if suffix_of(path) is not None else None
            if not path.is_file() and (reader is None or path.exists()):
                self._left_out["broken link" if path.is_symlink() else "pipe or device"] += 1
            elif reader is None:
                self._left_out[kind_of(path.name)] += 1
            elif (isinstance(self._column, ChatColumns) and not reader.has_columns) or (
                reader.holds and not self._asked_for(path) and path.exists() and not reader.holds(path, self._column)
            ):
                without_column.append(path)
            else:  # a broken link with such a name is to be read, and so an error
                files.append(path)
                self._linked += linked
        if not files:  # reading the first says which columns there are
            return without_column
        for path in without_column:
            what = "conversations" if isinstance(self._column, ChatColumns) else f"a column {self._column!r}"
            self._left_out[f"{suffix_of(path)} without {what}"] += 1
        return files

    def _asked_for(self, path: Path) -> bool:
        """Return whether a pattern names the suffix of the file, as *.csv does."""
        return self._pattern is not None and self._pattern.lower().endswith(suffix_of(path) or "")

    def _entries(self) -> Iterable[Entry]:
        """Yield what is visible and no folder."""
        if self._pattern is None:
            walk = FolderWalk(self._root)
            yield from walk
            self._left_out += walk.left_out
            self._unreadable = walk.unreadable
            return
        self._unreadable = self._unreadable_folders(self._pattern)
        for path in set(self._root.glob(self._pattern)):
            if any(is_hidden(part) for part in path.relative_to(self._root).parts):
                self._left_out["hidden folder" if path.is_dir() else "hidden file"] += 1
            elif not path.is_dir():
                yield Entry(path, linked=False)

    def _unreadable_folders(self, pattern: str) -> dict[Path, DataError]:
        """Return the folders on the way of the pattern that cannot be read: `glob` passes over them."""
        found: dict[Path, DataError] = {}
        parts = PurePath(pattern).parts
        for count in range(len(parts)):
            for folder in self._root.glob("/".join(parts[:count])) if count else [self._root]:
                hidden = any(is_hidden(part) for part in folder.relative_to(self._root).parts)
                if not hidden and folder.is_dir() and (fault := fault_of(folder)) is not None:
                    found[folder] = fault
        return found

    def _relative(self, path: Path) -> str:
        """Return the file's name in unit ids: relative to the folder, with forward slashes on every system."""
        return path.relative_to(self._root).as_posix() if path != self._root else path.name

    def _listing_hash(self) -> str:
        digest = xxhash.xxh3_64()
        for path in self._files:
            size, modified = _status(path)
            digest.update(f"{self._relative(path)}\0{size}\0{modified}\n".encode("utf-8", "surrogateescape"))
        return f"files {digest.hexdigest()}"

    def check_unchanged(self) -> None:
        """Raise ChangedError where a file changed since the source was opened."""
        if self._listing_hash() != self.revision:
            raise ChangedError(
                f"{self.spec} changed while it was read. Rerun the command when nothing writes to it any more"
            )

    def units(self) -> Iterator[Unit]:
        for folder in sorted(self._unreadable):  # first, so that they stop a preparation at once
            yield Unit(self._relative(folder), partial(unreadable, self._unreadable[folder]))
        for path in self._files:
            name = self._relative(path)
            try:
                yield from reader_of(path).units(path, name, self._column, self._row_filter)
            except OSError as error:
                raise_machine_fault(error)
                fault = DataError(f"{path}: cannot be read ({error.strerror})")
                yield Unit(name, partial(unreadable, _broken_link(path) if path.is_symlink() else fault))


def _located(path: Path) -> Path:
    """Return the absolute path of what exists. A link to a file keeps its own name, which says what the file is."""
    own = path.parent.resolve() / path.name
    return own if path.is_file() and (suffix_of(own) or not suffix_of(path.resolve())) else path.resolve()


def _status(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change in ns; zeros for a broken link."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _broken_link(path: Path) -> DataError:
    return DataError(f"{path} is a link to {os.readlink(path)}, which does not exist")
