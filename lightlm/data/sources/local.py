"""Local files, folders and globs as a source."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lightlm.data.readers.registry import READERS, reader_of, suffix_of
from lightlm.data.readers.texts import Unit
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError


class LocalSource:
    """One file, or every supported file below a folder or that a glob matches, sorted by path.

    Hidden files and folders are left out.
    """

    def __init__(self, path: Path, text_column: str, row_filter: Filter | None = None) -> None:
        """Raises DataError where no file at `path` can be read, or one has no columns for `row_filter` to judge."""
        exists = path.exists()
        # A pattern is split into the folder before its first wildcard, and the rest.
        fixed = next((number for number, part in enumerate(path.parts) if glob.has_magic(part)), 0)
        self._root = (path if exists else Path(*path.parts[:fixed])).resolve()
        self._pattern = "**/*" if exists else "/".join(path.parts[fixed:])
        self._column, self._row_filter = text_column, row_filter
        self._files = self._find_files(path)
        suffix = suffix_of(self._root) if self._root.is_file() else None
        self.name = (self._root.name[: -len(suffix)] if suffix else self._root.name) or "data"
        self.spec = str(self._root if exists else self._root / self._pattern)
        self.description = f"{len(self._files)} file{'s' * (len(self._files) != 1)} under {path}"
        self.revision = self.fingerprint = self._listing_hash()
        self.size = sum(path.stat().st_size for path in self._files)

    def _find_files(self, given: Path) -> list[Path]:
        supported = ", ".join(READERS)
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
        unreadable = next((path for path in files if re.search("[\udc80-\udcff]", str(path))), None)
        if unreadable is not None:  # manifests and messages cannot hold it
            raise DataError(f"{str(unreadable)!r}: this file's name is not UTF-8. Rename it")
        plain = next((path for path in files if not reader_of(path).has_columns), None)
        if plain is not None and self._row_filter is not None:
            raise DataError(f'--filter "{self._row_filter.text}": {plain} is plain text, without columns to judge')
        return files

    def _relative(self, path: Path) -> str:
        """Return the file's name in unit ids: relative to the folder, with forward slashes on every system."""
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
            yield from reader_of(path).units(path, self._relative(path), self._column, self._row_filter)
