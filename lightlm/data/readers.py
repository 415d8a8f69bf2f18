"""Reading documents out of local files; every mistake in a file is reported with the file and the place in it."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias

from lightlm.data.hub_files import HubFile
from lightlm.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet as parquet

File: TypeAlias = Path | HubFile

BLOCK_BYTES = 64 << 20  # of an uncompressed .jsonl file: a few seconds of tokenizing

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


class Read(Protocol):
    """Yields the documents of a unit in their order; called anew for each pass."""

    def __call__(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class Unit:
    """A part of a source that can be read on its own: a file, a block of a file, a row group.

    `id` is the same in every pass over an unchanged source, and unique in it. Units can be pickled.
    """

    id: str
    read: Read


def suffix_of(path: File) -> str | None:
    """Which of `SUFFIXES` a file name ends in, case aside; None for a file that cannot be read."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def file_units(path: File, name: str, text_column: str) -> Iterator[Unit]:
    """The units of one file, whose ids start with `name`; opens Parquet files to count their row groups."""
    match suffix_of(path):
        case ".txt" | ".md":
            assert isinstance(path, Path)  # in a Hub data set, `datasets` makes each line of a text file a row
            yield Unit(name, partial(read_text, path))
        case ".parquet":
            for group in range(_row_groups(path, text_column)):
                yield Unit(f"{name}#row_group={group}", partial(read_row_group, path, group, text_column))
        case ".jsonl":
            for start in range(0, path.stat().st_size, BLOCK_BYTES):
                yield Unit(f"{name}#byte={start}", partial(read_json_block, path, start, text_column))
        case _:
            yield Unit(name, partial(read_compressed_json, path, text_column))


def read_text(path: Path) -> Iterator[str]:
    """The one document of a text file, with its line ends made uniform and a byte-order mark left out."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}. "
            "Convert the file, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
    yield text.replace("\r\n", "\n")


def read_json_block(path: File, start: int, text_column: str) -> Iterator[str]:
    """The documents of the lines that begin in the block of `BLOCK_BYTES` bytes at `start`."""
    try:
        with path.open("rb") as file:
            if start:
                # The line that holds the byte before this block began in an earlier one, even if it ends right there.
                file.seek(start - 1)
                file.readline()
            while file.tell() < start + BLOCK_BYTES and (line := file.readline()):
                yield from _json_text(line, partial(_block_line, path, file.tell()), text_column)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def read_compressed_json(path: File, text_column: str) -> Iterator[str]:
    """The documents of a .jsonl.gz or .jsonl.zst file, one a line."""
    number = 0
    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            for number, line in enumerate(stream, start=1):
                yield from _json_text(line, partial("{}, line {}".format, path, number), text_column)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or truncated after line {number} ({error})") from error


def read_row_group(path: File, group: int, text_column: str) -> Iterator[str]:
    """The documents of one row group of a Parquet file; null texts are left out."""
    import pyarrow

    try:
        with _parquet(path) as file:
            for batch in file.iter_batches(row_groups=[group], columns=[text_column], batch_size=1024):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: row group {group} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row group {group} holds text that is not UTF-8 ({error})") from error


def _parquet(path: File) -> "parquet.ParquetFile":
    import pyarrow.parquet as parquet

    return path.open_parquet() if isinstance(path, HubFile) else parquet.ParquetFile(path)


def _row_groups(path: File, text_column: str) -> int:
    """How many row groups a Parquet file has. Raises DataError where it has no such text column."""
    import pyarrow

    try:
        with _parquet(path) as file:
            schema, groups = file.schema_arrow, file.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    if text_column not in schema.names:
        raise missing_column(str(path), text_column, schema.names)
    kind = schema.field(text_column).type
    if not any(
        test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    ):
        raise DataError(f"{path}: the column {text_column!r} holds {kind}, not text")
    return groups


def missing_column(where: str, text_column: str, columns: list[str]) -> DataError:
    """The error for a record without the text column, naming the columns there are."""
    return DataError(
        f"{where}: no column {text_column!r}; there are: {', '.join(columns) or 'none'}. "
        "Name the one with the text: --text-column NAME"
    )


def _json_text(line: bytes, where: Callable[[], str], text_column: str) -> Iterator[str]:
    """The text of one JSON line; nothing for a blank line or a null text. `where()` names the line in an error."""
    if not line.strip():
        return
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where()}: not UTF-8 at byte {error.start} of the line") from error
    except ValueError as error:
        raise DataError(f"{where()}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where()}: a JSON object was expected, with the text under {text_column!r}")
    if text_column not in record:
        raise missing_column(where(), text_column, list(record))
    text = record[text_column]
    if text is None:
        return
    if not isinstance(text, str):
        raise DataError(f"{where()}: {text_column!r} holds {type(text).__name__}, not text")
    # JSON can spell half of a surrogate pair ("\ud83d"), which is no character; it becomes U+FFFD.
    yield text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _block_line(path: File, end: int) -> str:
    """The line that ends at byte `end`; only an error asks, so counting from the start of the file is fine."""
    with path.open("rb") as file:
        lines = file.read(end).splitlines()
    return f"{path}, line {len(lines)}"


def _decompressed(raw: BinaryIO, path: File) -> BinaryIO:
    if suffix_of(path) == ".jsonl.gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    import pyarrow

    # Unlike the reader of the zstandard package, Arrow's notices a file that ends in the middle of a frame.
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
