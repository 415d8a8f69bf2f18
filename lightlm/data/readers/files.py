"""Reading documents out of local files; every mistake in a file is reported with the file and the place in it."""

import codecs
import errno
import functools
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc

from lightlm.data.readers.jsonl import Line, large_line, lines_of
from lightlm.data.readers.parquet_footers import File, footer, has_matches, open_parquet
from lightlm.data.readers.row_filter import RowFilter
from lightlm.data.readers.texts import (
    ABANDONED,
    CHUNK_BYTES,
    BadRecord,
    FilteredOut,
    Stream,
    Texts,
    Unit,
    in_chunks,
    pack,
    read_strings,
)
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError

SPOOLED_BYTES = 256 << 20  # of a row group
_SPOOLED = pyarrow.schema([("text", pyarrow.large_string()), ("unfinished", pyarrow.bool_())])
BLOCK_BYTES = 64 << 20  # of an uncompressed .jsonl file: a second of work

PlacedLine = tuple[Line, Callable[[], str]]  # and a function that names its place in an error

PLAIN = (".txt", ".md")
SUFFIXES = (*PLAIN, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def suffix_of(path: File) -> str | None:
    """Which of `SUFFIXES` a file name ends in, case aside; None for a file that cannot be read."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def file_units(path: File, name: str, text_column: str, chosen: Filter | None = None) -> Iterator[Unit]:
    """The units of one file, whose ids start with `name`; opens Parquet files to count their row groups.

    Only records that `chosen` keeps are read; a plain text has no columns to judge by.
    """
    size = path.stat().st_size
    match suffix_of(path):
        case ".txt" | ".md":
            yield _unit(name, size, partial(read_text, path))
        case ".parquet":
            try:
                groups = _row_groups(path, text_column, chosen)
            except DataError as error:  # said when it is read: --skip-bad may leave it out
                yield _unit(f"{name}#unreadable", size, partial(_unreadable, error))
                return
            for group in range(groups):
                stream = partial(read_row_group, path, group, text_column, chosen=chosen)
                yield _unit(f"{name}#row_group={group}", size // groups, stream)
        case ".jsonl":
            for start in range(0, size, BLOCK_BYTES):
                stream = partial(read_json_block, path, start, text_column, chosen=chosen)
                yield _unit(f"{name}#byte={start}", min(BLOCK_BYTES, size - start), stream)
        case _:
            yield _unit(name, size, partial(read_compressed_json, path, text_column, chosen=chosen))


def _unit(name: str, size: int, stream: Stream) -> Unit:
    return Unit(name, partial(read_strings, stream), size, stream)


def _unreadable(error: DataError, bad: BadRecord) -> Iterator[Texts]:
    bad(error)
    yield from ()


def read_text(path: File, bad: BadRecord) -> Iterator[Texts]:
    """The one document of a text file, with its line ends made uniform and a byte-order mark left out."""
    decoder = io.IncrementalNewlineDecoder(_Utf8(path), translate=False)
    held = ""  # the decoder keeps back a CR at the end, until it knows what follows
    try:
        with path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                text = decoder.decode(block).replace("\r\n", "\n")
                if held and text:
                    yield Texts(_array(held), unfinished=True)
                held = text or held
            text = decoder.decode(b"", final=True)
    except OSError as error:
        _raise_own(error)
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    yield Texts(_array(held + text))


def _array(text: str) -> pyarrow.Array:
    return pyarrow.array([text], pyarrow.large_string())


class _Utf8(codecs.IncrementalDecoder):
    """UTF-8 without its byte-order mark; says where in the file a byte is wrong."""

    def __init__(self, path: File) -> None:
        super().__init__()
        self._path, self._offset = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def decode(self, block: bytes, final: bool = False) -> str:  # type: ignore[override]
        self._offset += len(block)
        try:
            return self._decoder.decode(block, final)
        except UnicodeDecodeError as error:
            place = self._offset - len(error.object) + error.start
            raise DataError(
                f"{self._path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place}. "
                "Convert the file, for example with: iconv -f LATIN1 -t UTF-8"
            ) from error


def read_json_block(
    path: File, start: int, text_column: str, bad: BadRecord, chosen: Filter | None = None
) -> Iterator[Texts]:
    """The documents of the lines that begin in the block of `BLOCK_BYTES` bytes at `start`."""
    try:
        with path.open("rb") as file:
            if start:
                # The line that holds the byte before this block began in an earlier one, even if it ends right there.
                file.seek(start - 1)
                _skip_line(file)
            yield from _json_texts(_block_lines(path, file, start), text_column, chosen, bad)
    except OSError as error:
        _raise_own(error)
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _block_lines(path: File, file: BinaryIO, start: int) -> Iterator[PlacedLine]:
    lines, number = lines_of(file), 0
    while file.tell() < start + BLOCK_BYTES and (line := next(lines, None)) is not None:
        number += 1
        yield line, partial(_block_line, path, start, number)


def _skip_line(file: BinaryIO) -> None:
    while (piece := file.readline(CHUNK_BYTES)) and not piece.endswith(b"\n"):
        pass


def read_compressed_json(path: File, text_column: str, bad: BadRecord, chosen: Filter | None = None) -> Iterator[Texts]:
    """The documents of a .jsonl.gz or .jsonl.zst file, one a line."""
    number = 0

    def lines(stream: BinaryIO) -> Iterator[PlacedLine]:
        nonlocal number
        for number, line in enumerate(lines_of(stream), start=1):
            yield line, partial("{}, line {}".format, path, number)

    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            yield from _json_texts(lines(stream), text_column, chosen, bad)
    except (OSError, EOFError, zlib.error) as error:
        _raise_own(error)
        raise DataError(f"{path}: damaged or truncated after line {number} ({error})") from error


def _json_texts(
    lines: Iterator[PlacedLine], text_column: str, chosen: Filter | None, bad: BadRecord
) -> Iterator[Texts]:
    """The texts of JSON lines: packed, and large ones in parts. Those before a damaged end of the file come first."""
    small: list[str] = []
    characters = 0
    try:
        for line, where in lines:
            if not isinstance(line, bytes):
                yield from pack(small)
                small, characters = [], 0
                yield from _large_text(line, where, text_column, chosen, bad)
                continue
            try:
                text = _json_text(line, where, text_column, chosen)
            except DataError as error:
                bad(error)
                continue
            if text is not None:
                small.append(text)
                characters += len(text)
            if characters >= CHUNK_BYTES:
                yield from pack(small)
                small, characters = [], 0
    except (OSError, EOFError, zlib.error):
        yield from pack(small)
        raise
    yield from pack(small)


def _large_text(
    line: Line, where: Callable[[], str], text_column: str, chosen: Filter | None, bad: BadRecord
) -> Iterator[Texts]:
    begun = False
    try:
        for texts in large_line(line, where, text_column, chosen):
            yield texts
            begun = texts.unfinished
    except DataError as error:
        bad(error)
        if begun:
            yield ABANDONED


def read_row_group(
    path: File, group: int, text_column: str, bad: BadRecord, chosen: Filter | None = None
) -> Iterator[Texts]:
    """The documents of one row group of a Parquet file; null texts are left out, and what `chosen` does not keep."""
    try:
        if chosen is not None and not has_matches(path, group, chosen):
            bad(FilteredOut(footer(path).row_group(group).num_rows))
            return
        with open_parquet(path) as file:
            picked = RowFilter(str(path), file.schema_arrow, chosen) if chosen is not None else None
            texts = _row_texts(file, group, text_column, picked, bad)
            if file.metadata.row_group(group).total_byte_size <= SPOOLED_BYTES:
                yield from texts
                return
            spool = _spool(texts)
        with spool:
            yield from _spooled(spool)
    except (pyarrow.ArrowException, OSError) as error:
        _raise_own(error)
        if "UTF8" in str(error).replace("-", "").upper():
            raise DataError(f"{path}: row group {group} holds text that is not UTF-8 ({error})") from error
        raise DataError(f"{path}: row group {group} cannot be read: {error}") from error


def _row_texts(file: Any, group: int, text_column: str, picked: RowFilter | None, bad: BadRecord) -> Iterator[Texts]:
    rows = _batch_rows(file.metadata.row_group(group))
    columns = [text_column, *(picked.columns if picked is not None else ())]
    for batch in file.iter_batches(row_groups=[group], columns=columns, batch_size=rows):
        if picked is not None:
            batch = picked.rows(batch, bad)
        column = batch.column(text_column)
        if column.null_count:
            column = column.drop_null()
        column.validate(full=True)  # Parquet's strings are not checked to be UTF-8 otherwise
        yield from in_chunks(column.cast(pyarrow.large_string()))
        del batch, column  # one large text would be held while the next is read


def _spool(texts: Iterator[Texts]) -> BinaryIO:
    """Texts in a temporary file: of a large one Arrow's reader holds two or three copies until it is closed."""
    pyarrow.default_memory_pool().release_unused()  # 190 MB, where large texts have been encoded
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        with pyarrow.ipc.new_stream(file, _SPOOLED) as sink:
            for array, unfinished in texts:
                flags = pyarrow.array([unfinished] * len(array))
                sink.write_batch(pyarrow.record_batch([array, flags], schema=_SPOOLED))
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _spooled(file: BinaryIO) -> Iterator[Texts]:
    pyarrow.default_memory_pool().release_unused()
    for batch in pyarrow.ipc.open_stream(file):
        yield Texts(batch.column(0), unfinished=batch.column(1)[0].as_py())


def _batch_rows(group: Any) -> int:
    """How many rows of a row group make about one chunk, by its average; few, since one text may be far above it."""
    return max(1, min(4_096, int(group.num_rows * CHUNK_BYTES / max(1, group.total_byte_size))))


def _row_groups(path: File, text_column: str, chosen: Filter | None) -> int:
    """How many row groups a Parquet file has. Raises DataError where it lacks the text column, or a filter's."""
    try:
        found = footer(path)
        schema, groups = found.schema.to_arrow_schema(), found.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        _raise_own(error)
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    if text_column not in schema.names:
        raise missing_column(str(path), text_column, schema.names)
    if schema.names.count(text_column) > 1:
        raise DataError(f"{path}: there are two columns named {text_column!r}; rename one")
    kind = schema.field(text_column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(
        test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    ):
        raise DataError(f"{path}: the column {text_column!r} holds {kind}, not text")
    if chosen is not None:
        chosen.arrow(schema, str(path))
    return groups


def missing_column(where: str, text_column: str, columns: list[str]) -> DataError:
    """The error for a record without the text column, naming the columns there are."""
    return DataError(
        f"{where}: no column {text_column!r}; there are: {', '.join(columns) or 'none'}. "
        "Name the one with the text: --text-column NAME"
    )


def _json_text(line: bytes, where: Callable[[], str], text_column: str, chosen: Filter | None) -> str | None:
    """The text of one JSON line; None for a blank line or a null text. `where()` names the line in an error."""
    text = parse_record(line, where, text_column, chosen) if line.strip() else None
    if text is None:
        return None
    # JSON can spell half of a surrogate pair ("\ud83d"), which is no character; it becomes U+FFFD.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_record(line: bytes, where: Callable[[], str], text_column: str, chosen: Filter | None = None) -> str | None:
    """The text of one JSON line as it stands there; None for a null. Raises FilteredOut, or DataError for a mistake."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where()}: not UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:  # the second for thousands of brackets within each other
        raise DataError(f"{where()}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where()}: a JSON object was expected, with the text under {text_column!r}")
    if text_column not in record:
        raise missing_column(where(), text_column, list(record))
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where()}: {text_column!r} holds {type(text).__name__}, not text")
    if chosen is not None and not chosen.keeps(record, where):
        raise FilteredOut
    return text


def _block_line(path: File, start: int, number: int) -> str:
    """The name, for an error, of the `number`-th line that begins in the block at byte `start`."""
    if not isinstance(path, Path) and start:  # to count the lines before would fetch them once more
        return f"{path}, line {number} after byte {start}"
    before = sum(_line_ends(path, max(0, place - 1), place + BLOCK_BYTES - 1) for place in range(0, start, BLOCK_BYTES))
    return f"{path}, line {before + number + (start > 0)}"


@functools.lru_cache(maxsize=1 << 14)  # a terabyte: with --skip-bad there may be a million errors in a file
def _line_ends(path: File, start: int, end: int) -> int:
    """How many lines end in a stretch of a file."""
    with path.open("rb") as file:
        file.seek(start)
        return sum(file.read(min(CHUNK_BYTES, end - place)).count(b"\n") for place in range(start, end, CHUNK_BYTES))


_OWN_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def _raise_own(error: BaseException) -> None:
    """Raise a fault of this machine as it is. It says nothing about the file, so --skip-bad must not skip any of it."""
    if isinstance(error, OSError) and error.errno in _OWN_FAULTS:
        raise error


def _decompressed(raw: BinaryIO, path: File) -> BinaryIO:
    if suffix_of(path) == ".jsonl.gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    # Unlike the reader of the zstandard package, Arrow's notices a file that ends in the middle of a frame.
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
