"""Delimited text (.csv, .tsv): the first line names the columns, and a row is a record.

A quoted field may hold line ends, so a file is read from its start to its end.
"""

import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.readers.file import File
from lightlm.data.readers.opening import head_of, open_text
from lightlm.data.readers.recognition import holds_nul, not_utf8
from lightlm.data.readers.records import missing_column, text_of
from lightlm.data.readers.texts import CHUNK_BYTES, NULL, RECORD_BYTES, BadRecord, Omitted, Texts, Unit, pack, too_large
from lightlm.data.select.filters import FILTERED, Filter
from lightlm.errors import DataError

_WORDS = {"true": True, "false": False}


def delimited_units(
    separators: str, file: File, name: str, text_column: str, row_filter: Filter | None
) -> Iterator[Unit]:
    """Yield the one unit of a file; see `separator_of`."""
    stream = partial(read_delimited, separators, file, text_column, row_filter=row_filter)
    yield Unit(name, stream, file.stat().st_size)


def delimited_has_column(separators: str, file: File, text_column: str) -> bool:
    """Return whether the first line names the text column; True where it cannot be read, so that reading says why."""
    try:
        with open_text(file) as opened:
            head = head_of(opened)
    except DataError:
        return True
    cut = len(head) >= io.DEFAULT_BUFFER_SIZE and b"\n" not in head and b"\r" not in head
    return cut or any(_is_named(text_column, _header(head, separator)) for separator in separators)


def read_delimited(
    separators: str, file: File, text_column: str, bad: BadRecord, row_filter: Filter | None = None
) -> Iterator[Texts]:
    """Yield the texts of the rows. The texts before a damage come before its error."""
    with open_text(file) as opened:
        head = head_of(opened)
        if head.strip():
            table = _Table(file, opened, head, separator_of(head, separators, text_column), text_column)
            yield from pack(table.texts(bad, row_filter))


def separator_of(head: bytes, separators: str, text_column: str) -> str:
    """Return the first separator with which the first line names the text column; else that of the most columns."""
    names = {each: _header(head, each) for each in separators}
    named = (each for each in separators if _is_named(text_column, names[each]))
    return next(named, max(separators, key=lambda each: len(names[each])))


def _header(head: bytes, separator: str) -> list[str]:
    lines = io.StringIO(head.decode("utf-8", "surrogateescape"), newline="")
    try:
        return [name.strip() for name in next(csv.reader(lines, delimiter=separator), [])]
    except csv.Error:
        return []


def _is_named(text_column: str, names: list[str]) -> bool:
    return text_column.found_in(names) if isinstance(text_column, ChatColumns) else text_column in names


class _Table:
    """The rows of one file."""

    def __init__(self, file: File, opened: BinaryIO, head: bytes, separator: str, text_column: str) -> None:
        """Raises DataError where the first line does not name the text column, or names it twice."""
        self._file, self._head, self._separator = file, head, separator
        csv.field_size_limit(RECORD_BYTES)
        # A byte that is not UTF-8 becomes half a surrogate pair, so that only its own row is a mistake.
        self._text = io.TextIOWrapper(opened, encoding="utf-8", errors="surrogateescape", newline="")
        self._lines = _Lines(file, self._text)
        self._rows = csv.reader(self._lines, delimiter=separator, strict=True)
        try:
            header = next(self._rows)
        except csv.Error as error:
            raise self._not_a_row(1, error) from error
        self._require_no_nul(header, 1)
        self._columns = [name.strip() for name in header]
        self._text_column = text_column
        if isinstance(text_column, ChatColumns):
            if not text_column.found_in(self._columns):
                raise text_column.missing(f"{file}, line 1", [name for name in self._columns if name])
            return
        if text_column not in self._columns:
            raise missing_column(f"{file}, line 1", text_column, [name for name in self._columns if name])
        if self._columns.count(text_column) > 1:
            raise DataError(f"{file}: there are two columns named {text_column!r}; rename one")
        self._index = self._columns.index(text_column)

    def texts(self, bad: BadRecord, row_filter: Filter | None) -> Iterator[str]:
        """Yield the texts of the rows that `row_filter` keeps. A mistake in a row leaves the others."""
        while True:
            begins = self._lines.number + 1
            try:
                row = next(self._rows, None)
            except csv.Error as error:
                bad(self._not_a_row(begins, error))
                continue
            except DataError as error:  # of `_Lines`
                bad(error)
                continue
            if row is None:
                return
            if not row:  # a blank line
                continue
            if isinstance(self._text_column, ChatColumns) and not any(field.strip() for field in row):
                bad(Omitted(NULL))  # spreadsheets export their empty rows
                continue
            try:
                self._require_no_nul(row, begins)
                self._require_fields(row, begins)
                kept = row_filter is None or row_filter.keeps(
                    self._record(row, row_filter), partial(self._line, begins)
                )
                text = self._text_of(row, begins, bad) if kept else None
            except DataError as error:
                bad(error)
                continue
            if kept and text is not None:
                yield text
            else:
                bad(Omitted(FILTERED))

    def _require_fields(self, row: list[str], begins: int) -> None:
        if len(row) != len(self._columns):
            raise DataError(
                f"{self._line(begins)}: {len(row)} fields, but the first line names {len(self._columns)} columns. "
                "Put quotes around a text that holds the separator"
            )

    def _text_of(self, row: list[str], begins: int, bad: BadRecord) -> str | None:
        if isinstance(self._text_column, ChatColumns):
            record = dict(zip(self._columns, row, strict=True))
            for name in self._text_column.columns:
                self._require_utf8(record.get(name, ""), begins)
            return text_of(record, partial(self._line, begins), self._text_column, None, bad)
        text = row[self._index]
        self._require_utf8(text, begins)
        return text

    def _require_no_nul(self, row: list[str], begins: int) -> None:
        if any("\0" in field for field in row):
            raise holds_nul(self._line(begins), self._head, "")

    def _require_utf8(self, text: str, begins: int) -> None:
        """Raise DataError for a field with bytes that are not UTF-8."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                data = text.encode("utf-8", "surrogateescape")
                raise not_utf8(self._line(begins), data, ord(text[error.start]) - 0xDC00, "in its text") from error

    def _record(self, row: list[str], row_filter: Filter) -> dict[str, Any]:
        """Return the row as a record; the values that the filter compares are of the kind that it compares with."""
        record: dict[str, Any] = dict(zip(self._columns, row, strict=True))
        for column, kind in row_filter.kinds.items():
            if column in record:
                record[column] = _typed(record[column], kind)
        return record

    def _line(self, number: int) -> str:
        return f"{self._file}, line {number}"

    def _not_a_row(self, begins: int, error: csv.Error) -> DataError:
        return DataError(f"{self._line(begins)}: not a row with the separator {self._separator!r} ({error})")


class _Lines:
    """The lines of a file, `number` of which are read. Unlike a generator, it continues after an error."""

    def __init__(self, file: File, text: io.TextIOWrapper) -> None:
        self._file, self._text, self.number = file, text, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        """Return the next line. Raises DataError for one above `RECORD_BYTES`, which is passed over."""
        line = self._text.readline(RECORD_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) <= RECORD_BYTES:
            return line
        while line and not line.endswith(("\n", "\r")):
            line = self._text.readline(CHUNK_BYTES)
        raise too_large(f"{self._file}, line {self.number}", "CSV")


def _number(value: str) -> int | float:
    try:
        return int(value)
    except ValueError:
        return float(value)


_TYPES: dict[str | None, Callable[[str], Any]] = {
    "a number": _number,
    "true or false": lambda value: _WORDS[value.lower()],
}


def _typed(value: str, kind: str | None) -> Any:
    """Return a field as the kind that a filter compares it with, if it can be; an empty one is null."""
    if not value:
        return None
    try:
        return _TYPES.get(kind, str)(value)
    except (ValueError, KeyError):
        return value
