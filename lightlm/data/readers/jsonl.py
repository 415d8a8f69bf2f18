"""JSON (.jsonl, .ndjson, .json): a record per line, or an array of records; its text is a document.

A file of lines is read in blocks; any other layout, and a compressed file, from its start to its end.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO

from lightlm.data.readers.file import File, is_local, raise_machine_fault
from lightlm.data.readers.json_values import JsonValues, is_lines, values_of_line
from lightlm.data.readers.opening import head_of, open_text
from lightlm.data.readers.recognition import HEAD_BYTES, byte_order_mark, not_utf8, what_it_is
from lightlm.data.readers.records import holds_column, texts_of
from lightlm.data.readers.texts import CHUNK_BYTES, RECORD_BYTES, BadRecord, Texts, Unit, pack, too_large
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError

BLOCK_BYTES = 64 << 20  # of an uncompressed file: a second of work

Line = bytes | None  # None: the line is above RECORD_BYTES


def jsonl_units(file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]:
    """Yield a unit for each `BLOCK_BYTES` of an uncompressed file of lines."""
    size = file.stat().st_size
    if size > BLOCK_BYTES and is_local(file) and not _is_lines_of(file):
        yield Unit(name, partial(read_json, file, text_column, row_filter=row_filter), size)
        return
    for start in range(0, size, BLOCK_BYTES):
        stream = partial(read_json_block, file, start, text_column, row_filter=row_filter)
        yield Unit(f"{name}#byte={start}", stream, min(BLOCK_BYTES, size - start))


def compressed_jsonl_units(file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]:
    """Yield the one unit of a compressed file: it can be read only from its start."""
    yield Unit(name, partial(read_json, file, text_column, row_filter=row_filter), file.stat().st_size)


def json_has_column(file: File, text_column: str) -> bool:
    """Return whether the first record has the text column; True where it cannot be read, so that reading says why."""
    try:
        with open_text(file) as opened:
            if is_lines(head_of(opened)):
                found = next((_parse(line, str, 1) for line in _lines(opened) if line and line.strip()), None)
                first = found[0] if isinstance(found, list) and found else found
            else:
                _, first = next(iter(JsonValues(opened, str(file))), ("", None))
    except DataError:
        return True
    return isinstance(first, Mapping) and holds_column(first, text_column)


def read_json_block(
    file: File, start: int, text_column: str, bad: BadRecord, row_filter: Filter | None = None
) -> Iterator[Texts]:
    """Yield the texts of the lines that begin in the block of `BLOCK_BYTES` bytes at `start`."""
    end = start + BLOCK_BYTES
    try:
        with file.open("rb") as opened:
            if start:
                # The line that holds the byte before this block began in an earlier one, even if it ends right there.
                opened.seek(start - 1)
                _skip_line(opened, end)
            elif file.stat().st_size <= BLOCK_BYTES and not _is_plain_lines(head_of(opened)):
                yield from read_json(file, text_column, bad, row_filter)
                return
            where = partial(_line_in_block, file, start)
            records = _records(_lines(opened, end), where, bad)
            yield from pack(texts_of(records, text_column, row_filter, bad, sparse=True))
    except OSError as error:
        raise_machine_fault(error)
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def read_json(file: File, text_column: str, bad: BadRecord, row_filter: Filter | None = None) -> Iterator[Texts]:
    """Yield the texts of a file in any layout, from its start. The texts before a damage come before its error."""
    with open_text(file) as opened:
        if is_lines(head_of(opened)):
            where = partial("{}, line {}".format, file)
            texts = texts_of(_records(_lines(opened), where, bad), text_column, row_filter, bad, sparse=True)
        else:
            values = ((partial(str, place), value) for place, value in JsonValues(opened, str(file)))
            texts = texts_of(values, text_column, row_filter, bad, sparse=True)
        yield from pack(texts)


def _is_lines_of(file: File) -> bool:
    try:
        with file.open("rb") as opened:
            return _is_plain_lines(opened.read(HEAD_BYTES))
    except OSError:  # reading the unit says so
        return True


def _is_plain_lines(head: bytes) -> bool:
    """Return whether an uncompressed file can be read line by line as it is: see `is_lines`."""
    mark = byte_order_mark(head)
    if mark is not None:
        return mark[0] == "utf-8" and is_lines(head[mark[1] :])
    return is_lines(head) and head[:1] in b" \t\r\n{"


def _lines(file: BinaryIO, end: int | None = None) -> Iterator[Line]:
    """Yield the lines that begin before byte `end`; of a line above `RECORD_BYTES`, no more than that is held."""
    while (end is None or file.tell() < end) and (line := file.readline(RECORD_BYTES + 1)):
        if len(line) > RECORD_BYTES and not line.endswith(b"\n"):
            del line  # before the rest of it is read
            yield None
            _skip_line(file, None)
        else:
            yield line


def _skip_line(file: BinaryIO, end: int | None) -> None:
    """Read to the end of the line, or to byte `end`."""
    while (end is None or file.tell() < end) and (part := file.readline(CHUNK_BYTES)) and not part.endswith(b"\n"):
        pass


def _records(
    lines: Iterator[Line], where: Callable[[int], str], bad: BadRecord
) -> Iterator[tuple[Callable[[], str], Any]]:
    """Yield the values on the lines, each with what names its line; `where(n)` names the n-th."""
    for number, line in enumerate(lines, start=1):
        place = partial(where, number)
        try:
            if line is None:
                raise too_large(place(), "JSON")
            if not line.strip():
                continue
            record = _parse(line, place, number)
        except DataError as error:
            bad(error)
            continue
        for each in record if isinstance(record, list) else [record]:
            yield place, each


def _parse(line: bytes, where: Callable[[], str], number: int) -> Any:
    """Return the value on a line, or the list of several."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        head = line[:HEAD_BYTES] if number == 1 else line[max(0, error.start - 1000) : error.start + 1000]
        raise not_utf8(where(), head, line[error.start], f"of the line, at {error.start}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        several = values_of_line(error.doc) if isinstance(error, json.JSONDecodeError) else []
        if several:
            return several
        known = what_it_is(line[:HEAD_BYTES]) if number == 1 else None
        place = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where()}: not valid JSON ({known or place})") from error


def _line_in_block(file: File, start: int, number: int) -> str:
    """Return the name, for an error, of the `number`-th line that begins in the block at byte `start`."""
    if start and not is_local(file):  # counting the lines before would fetch them once more
        return f"{file}, line {number} after byte {start}"
    before = sum(_line_ends(file, max(0, at - 1), at + BLOCK_BYTES - 1) for at in range(0, start, BLOCK_BYTES))
    return f"{file}, line {before + number + (start > 0)}"


@functools.lru_cache(maxsize=1 << 14)  # a terabyte: with --skip-bad there may be a million errors in a file
def _line_ends(file: File, start: int, end: int) -> int:
    """Count the lines that end between two bytes of a file."""
    with file.open("rb") as opened:
        opened.seek(start)
        return sum(opened.read(min(CHUNK_BYTES, end - at)).count(b"\n") for at in range(start, end, CHUNK_BYTES))
