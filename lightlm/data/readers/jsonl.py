"""JSON lines (.jsonl, .jsonl.gz, .jsonl.zst): a line is a record, and its text a document."""

import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

import pyarrow

from lightlm.data.readers.file import File, is_local, raise_machine_fault
from lightlm.data.readers.records import text_of
from lightlm.data.readers.texts import CHUNK_BYTES, RECORD_BYTES, BadRecord, Texts, Unit, pack, too_large
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError

BLOCK_BYTES = 64 << 20  # of an uncompressed file: a second of work

Line = bytes | None  # None: the line is above RECORD_BYTES


def jsonl_units(file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]:
    """Yield a unit for each `BLOCK_BYTES` of an uncompressed file."""
    size = file.stat().st_size
    for start in range(0, size, BLOCK_BYTES):
        stream = partial(read_json_block, file, start, text_column, row_filter=row_filter)
        yield Unit(f"{name}#byte={start}", stream, min(BLOCK_BYTES, size - start))


def compressed_jsonl_units(file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]:
    """Yield the one unit of a compressed file: it can be read only from its start."""
    stream = partial(read_compressed_json, file, text_column, row_filter=row_filter)
    yield Unit(name, stream, file.stat().st_size)


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
            where = partial(_line_in_block, file, start)
            yield from pack(_texts(_lines(opened, end), where, text_column, row_filter, bad))
    except OSError as error:
        raise_machine_fault(error)
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def read_compressed_json(
    file: File, text_column: str, bad: BadRecord, row_filter: Filter | None = None
) -> Iterator[Texts]:
    """Yield the texts of a .jsonl.gz or .jsonl.zst file. The texts before a damage come before its error."""
    try:
        with file.open("rb") as raw, _decompressed(raw, file.name) as opened:
            where = partial("{}, line {}".format, file)
            yield from pack(_texts(_lines(opened), where, text_column, row_filter, bad))
    except (OSError, EOFError, zlib.error) as error:
        raise_machine_fault(error)
        raise DataError(f"{file}: damaged or truncated ({error})") from error


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


def _texts(
    lines: Iterator[Line], where: Callable[[int], str], text_column: str, row_filter: Filter | None, bad: BadRecord
) -> Iterator[str]:
    """Yield the texts of the lines; `where(n)` names the n-th line in an error."""
    for number, line in enumerate(lines, start=1):
        try:
            if line is None:
                raise too_large(where(number), "JSON")
            if not line.strip():
                continue
            place = partial(where, number)
            text = text_of(_parse(line, place), place, text_column, row_filter, bad)
        except DataError as error:
            bad(error)
            continue
        if text is not None:
            yield _valid(text)


def _parse(line: bytes, where: Callable[[], str]) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where()}: not UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise DataError(f"{where()}: not valid JSON ({error})") from error


def _valid(text: str) -> str:
    """Replace each half of a surrogate pair ("\\ud83d"), which JSON can spell, by U+FFFD."""
    try:
        text.encode("utf-16")  # faster than UTF-8
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


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


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.lower().endswith(".gz"):
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    # Unlike the reader of the zstandard package, Arrow's notices a file that ends in the middle of a frame.
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
