"""Parquet files: a row group is a unit, and a row a document.

The units of a file follow one another, and one footer describes all its row groups. Read again for each, the footer of
thousands of row groups takes most of the time, and on the Hub a request each; so footers are cached.
"""

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute, dataset, parquet, types

from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.readers.file import File, is_local, raise_machine_fault
from lightlm.data.readers.recognition import HEAD_BYTES, refuse_pointer, what_it_is
from lightlm.data.readers.records import missing_column, texts_of
from lightlm.data.readers.texts import (
    CHUNK_BYTES,
    NULL,
    RECORD_BYTES,
    BadRecord,
    Omitted,
    Texts,
    Unit,
    byte_lengths,
    in_chunks,
    pack,
    too_large,
    unreadable,
)
from lightlm.data.select.columns import arrow_field
from lightlm.data.select.filters import FILTERED, Filter, matching_rows
from lightlm.errors import DataError

TEXT_TYPES = (
    types.is_string, types.is_large_string, types.is_string_view,
    types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary,
    types.is_null,
)  # fmt: skip

FOOTERS = 4  # kept per process, as files are read one after the other

# A buffer: otherwise the whole column of a row group, which may be gigabytes, is read before its first page. Each fill
# of it is a request to a remote file.
LOCAL_BUFFER_BYTES, REMOTE_BUFFER_BYTES = 1 << 20, 8 << 20


def parquet_units(file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]:
    """Yield a unit for each row group."""
    size = file.stat().st_size
    try:
        groups = _row_groups(file, text_column, row_filter)
    except DataError as error:  # raised when the unit is read, so that --skip-bad may skip the file
        yield Unit(f"{name}#unreadable", partial(unreadable, error), size)
        return
    for group in range(groups):
        stream = partial(read_row_group, file, group, text_column, row_filter=row_filter)
        yield Unit(f"{name}#row_group={group}", stream, size // groups)


def _row_groups(file: File, text_column: str, row_filter: Filter | None) -> int:
    """Return the number of row groups. Raises DataError where it lacks the text column, or a filter's."""
    try:
        found = _footer(file, _version(file))
        schema, groups = found.schema.to_arrow_schema(), found.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise_machine_fault(error)
        raise DataError(f"{file}: not a readable Parquet file: {_explanation(file) or error}") from error
    if isinstance(text_column, ChatColumns):
        if not text_column.found_in(schema.names):
            raise text_column.missing(str(file), _names(schema))
        if row_filter is not None:
            row_filter.arrow(schema, str(file))
        return int(groups)
    try:
        path, kind = arrow_field(text_column, schema)
    except KeyError:
        raise missing_column(str(file), text_column, _names(schema)) from None
    if schema.names.count(path[0]) > 1:
        raise DataError(f"{file}: there are two columns named {path[0]!r}; rename one")
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not any(fits(value) for fits in TEXT_TYPES):
        inside = f", for example {text_column}.{kind.field(0).name}" if types.is_struct(kind) and len(kind) else ""
        raise DataError(
            f"{file}: the column {text_column!r} holds {kind}, not text. "
            f"Name the one with the text{inside}: --text-column NAME"
        )
    if row_filter is not None:
        row_filter.arrow(schema, str(file))
    return groups


def _names(schema: pyarrow.Schema) -> list[str]:
    """Return the columns, each struct's fields with dots."""
    names: list[str] = []
    for field in schema:
        inner = _names(pyarrow.schema(list(field.type))) if types.is_struct(field.type) else []
        names += [f"{field.name}.{name}" for name in inner] or [field.name]
    return names


def read_row_group(
    file: File, group: int, text_column: str, bad: BadRecord, row_filter: Filter | None = None
) -> Iterator[Texts]:
    """Yield the texts of one row group; nulls, and what `row_filter` does not keep, are left out and counted."""
    where = f"{file}, row group {group}"
    try:
        footer = _footer(file, _version(file))
        size = footer.row_group(group)
        if row_filter is not None and group not in _matching_groups(file, _version(file), row_filter):
            bad(Omitted(FILTERED, size.num_rows))
            return
        # Few rows at a time: about a chunk by the average, since one text may be far above it.
        rows = max(1, min(4_096, int(size.num_rows * CHUNK_BYTES / max(1, size.total_byte_size))))
        source = file if is_local(file) else file.open("rb", buffering=0)
        buffer = LOCAL_BUFFER_BYTES if is_local(file) else REMOTE_BUFFER_BYTES
        with parquet.ParquetFile(source, metadata=footer, buffer_size=buffer, pre_buffer=False) as opened:
            if isinstance(text_column, ChatColumns):
                yield from pack(_conversations(opened, group, rows, text_column, where, bad, row_filter))
                return
            path, _ = arrow_field(text_column, opened.schema_arrow)
            tested = row_filter.arrow_columns(opened.schema_arrow) if row_filter is not None else []
            expression = row_filter.arrow(opened.schema_arrow, where) if row_filter is not None else None
            first = 0
            for batch in opened.iter_batches(row_groups=[group], columns=[".".join(path), *tested], batch_size=rows):
                numbers, column = np.arange(first, first + len(batch)), batch.column(path[0])
                if path[1:]:
                    column = compute.struct_field(column, list(path[1:]))
                first += len(batch)
                column = _without_views(column)
                if expression is not None:
                    kept = matching_rows(pyarrow.Table.from_batches([batch.select(tested)]), expression)
                    if len(kept) < len(batch):
                        bad(Omitted(FILTERED, len(batch) - len(kept)))
                        numbers, column = numbers[kept], column.take(pyarrow.array(kept))
                column = _texts(numbers, column, where, bad)
                yield from in_chunks(column)
                del batch, column  # one large text would be held while the next is read
    except (pyarrow.ArrowException, OSError) as error:
        raise_machine_fault(error)
        raise DataError(f"{file}: row group {group} cannot be read: {error}") from error


def _without_views(column: pyarrow.Array) -> pyarrow.Array:
    """Return a column of text or bytes in a layout that can be filtered, which views cannot."""
    if types.is_string_view(column.type):
        return column.cast(pyarrow.large_string())
    return column.cast(pyarrow.large_binary()) if types.is_binary_view(column.type) else column


def _texts(numbers: np.ndarray, column: pyarrow.Array, where: str, bad: BadRecord) -> pyarrow.Array:
    """Return the texts of a column as a LargeStringArray; nulls, and what is broken or too large, go to `bad`.

    Args:
        numbers: (N,), the rows of the row group that the column holds, for messages.
    """
    if column.null_count:
        bad(Omitted(NULL, column.null_count))
        numbers, column = numbers[np.asarray(column.is_valid())], column.drop_null()
    numbers, column = _decoded(numbers, column, where, bad)
    large = byte_lengths(column) > RECORD_BYTES
    for number in numbers[large]:
        bad(too_large(f"{where}, row {number} of it", "text"))
    return column.filter(pyarrow.array(~large)) if large.any() else column


def _decoded(
    numbers: np.ndarray, column: pyarrow.Array, where: str, bad: BadRecord
) -> tuple[np.ndarray, pyarrow.Array]:
    """Return the rows of a column of text or bytes without nulls as a LargeStringArray, and their numbers."""
    try:
        column.validate(full=True)  # Parquet's strings are not checked to be UTF-8 otherwise
        return numbers, column.cast(pyarrow.large_string())
    except pyarrow.ArrowInvalid:
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        texts: dict[int, str] = {}
        for number, data in zip(numbers, column.cast(pyarrow.large_binary()).to_pylist(), strict=True):
            try:
                texts[number] = data.decode()
            except UnicodeDecodeError as error:
                bad(_not_utf8(where, number, error))
        return np.fromiter(texts, np.int64), pyarrow.array(list(texts.values()), pyarrow.large_string())


def _conversations(
    opened: parquet.ParquetFile, group: int, rows: int, columns: ChatColumns, where: str, bad: BadRecord,
    row_filter: Filter | None,
) -> Iterator[str]:  # fmt: skip
    """Yield the conversations of a row group as texts."""
    schema = opened.schema_arrow
    tested = row_filter.arrow_columns(schema) if row_filter is not None else []
    read = [name for name in columns.columns if name in schema.names]
    first = 0
    for batch in opened.iter_batches(row_groups=[group], columns=[*read, *tested], batch_size=rows):
        records = (
            (partial("{}, row {} of it".format, where, number), record)
            for number, record in _records(first, batch, where, bad)
        )
        yield from texts_of(records, columns, row_filter, bad)
        first += len(batch)


def _records(
    first: int, batch: pyarrow.RecordBatch, where: str, bad: BadRecord
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a batch with their numbers."""
    try:
        yield from enumerate(batch.to_pylist(), first)
    except UnicodeDecodeError:  # raised before the first
        for number in range(len(batch)):
            try:
                yield first + number, batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                bad(_not_utf8(where, first + number, error))


def _not_utf8(where: str, number: int, error: UnicodeDecodeError) -> DataError:
    byte = f"byte 0x{error.object[error.start]:02x} at {error.start} of its text"
    return DataError(f"{where}, row {number} of it: not UTF-8: {byte}")


def _explanation(file: File) -> str | None:
    """Return what a file is that is not Parquet; None where it is damaged. Raises DataError for a Git LFS pointer."""
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    refuse_pointer(file, head)
    return None if head.startswith(b"PAR1") else what_it_is(head)


def _version(file: File) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=FOOTERS)
def _footer(file: File, version: tuple[int, int]) -> parquet.FileMetaData:
    return parquet.read_metadata(file if is_local(file) else file.open("rb", buffering=0))


@functools.lru_cache(maxsize=FOOTERS)
def _matching_groups(file: File, version: tuple[int, int], row_filter: Filter) -> frozenset[int]:
    """Return the row groups that may have rows that `row_filter` keeps, by their statistics."""
    metadata = _footer(file, version)
    expression = row_filter.arrow(metadata.schema.to_arrow_schema(), str(file))
    content = pyarrow.BufferOutputStream()  # the footer suffices, wherever the file itself is
    metadata.write_metadata_file(content)
    fragment = dataset.ParquetFileFormat().make_fragment(pyarrow.BufferReader(content.getvalue()))
    return frozenset(group.id for group in fragment.subset(filter=expression).row_groups)
