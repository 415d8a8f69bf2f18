"""One JSON line of hundreds of megabytes: its text in parts, without a second and a third copy of the line."""

import json
import mmap
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow

from lightlm.data.readers.texts import CHUNK_BYTES, Texts
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError

LARGE_LINE_BYTES = 16 << 20  # `json.loads` takes up to nine bytes of memory a byte: the line and the text as UCS-4

Line = bytes | mmap.mmap  # a large one lies in a file without a name

_STRUCTURE = re.compile(rb'["{}\[\],:]')
_COLON = re.compile(rb"\s*:")
_ESCAPE_END = re.compile(rb"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_HIGH_SURROGATE_END = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")


def lines_of(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file; those above `LARGE_LINE_BYTES` as memory maps. Raises what the file raises."""
    while line := file.readline(LARGE_LINE_BYTES):
        if len(line) < LARGE_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        with tempfile.TemporaryFile() as spool:
            spool.write(line)
            while not line.endswith(b"\n") and (line := file.readline(CHUNK_BYTES)):
                spool.write(line)
            spool.flush()
            del line
            with mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) as large:
                yield large


def large_line(line: Line, where: Callable[[], str], text_column: str, chosen: Filter | None = None) -> Iterator[Texts]:
    """The text of one JSON line above `LARGE_LINE_BYTES`, in parts. `where()` names the line in an error.

    Raises DataError, at the latest with the part that is wrong, where the line is no object with such a text.
    """
    from lightlm.data.readers.files import parse_record

    span = _text_span(line, json.dumps(text_column).encode(), text_column)
    if span is None:
        # Says what is wrong, or finds a spelling that the search did not.
        parse_record(line[:], where, text_column, chosen)
        raise DataError(f"{where()}: {len(line) >> 20} MB of JSON whose text under {text_column!r} cannot be found")
    start, end = span
    parse_record(line[: start + 1] + line[end:], where, text_column, chosen)  # everything but the text
    return _parts(line, start + 1, end, where)


def _text_span(line: Line, quoted_name: bytes, name: str) -> tuple[int, int] | None:
    """Where the quotes around the text are; None where the top object has no such string.

    As with `json.loads`, the last of several counts.
    """
    depth, position, found = 0, 0, None
    key: bytes | None = None
    while match := _STRUCTURE.search(line, position):
        mark, position = match.group(), match.end()
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        elif mark == b'"':
            start = match.start()
            end = _closing_quote(line, position)
            if end is None:
                return None
            position = end + 1
            if depth != 1:
                continue
            if key is not None:
                if key == quoted_name or _is_name(key, name):
                    found = start, end
                key = None
            elif _COLON.match(line, position):
                key = line[start:position] if end - start < 1_000 else b""
        elif mark == b"," and depth == 1:
            key = None
    return found


def _is_name(key: bytes, name: str) -> bool:
    try:
        return bool(key) and json.loads(key) == name
    except ValueError:
        return False


def _closing_quote(line: Line, position: int) -> int | None:
    """The quote that ends a string, which is one after an even number of backslashes."""
    while (quote := line.find(b'"', position)) >= 0:
        before = quote
        while line[before - 1] == ord("\\"):
            before -= 1
        if (quote - before) % 2 == 0:
            return quote
        position = quote + 1
    return None


def _parts(line: Line, start: int, end: int, where: Callable[[], str]) -> Iterator[Texts]:
    """The characters between two quotes, in parts that cut no character, escape or pair of surrogates."""
    while True:
        border = _border(line, start, min(start + CHUNK_BYTES, end), end)
        try:
            text: str = json.loads(b'"' + line[start:border] + b'"')
        except UnicodeDecodeError as error:
            raise DataError(f"{where()}: not UTF-8 at byte {start + error.start - 1} of the line") from error
        except ValueError as error:
            raise DataError(f"{where()}: not valid JSON ({error}, from byte {start} of the line)") from error
        text = text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield Texts(pyarrow.array([text], pyarrow.large_string()), unfinished=border < end)
        if border >= end:
            return
        start = border


def _border(line: Line, start: int, border: int, end: int) -> int:
    """The nearest place at or before `border` where the text may be cut."""
    if border >= end:
        return end
    while line[border] & 0xC0 == 0x80:  # inside a character
        border -= 1
    for unfinished in (_ESCAPE_END, _HIGH_SURROGATE_END):  # the second, too, after the first has been left out
        found = unfinished.search(line[max(start, border - 6) : border])
        if found is not None and _escapes(line, start, border - len(found.group())):
            border -= len(found.group())
    return border


def _escapes(line: Line, start: int, place: int) -> bool:
    """Whether the backslash at `place` begins an escape, rather than being itself escaped."""
    before = place
    while before > start and line[before - 1] == ord("\\"):
        before -= 1
    return (place - before) % 2 == 0
