"""Records with columns (lines of JSON, rows that `datasets` streams) to the texts that a `--filter` keeps."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightlm.data.readers.texts import CHUNK_BYTES, CHUNK_DOCUMENTS, BadRecord, FilteredOut, Texts, pack
from lightlm.data.select.filters import Filter, matching_rows
from lightlm.errors import DataError


class Record(NamedTuple):
    """The text of a record (None for a null), and the values by which a filter judges it."""

    text: str | None
    values: Sequence[Any] = ()


def record_of(
    columns: Mapping[str, Any], where: Callable[[], str], text_column: str, row_filter: Filter | None
) -> Record:
    """Return the record; `where()` names it in an error.

    Raises DataError where the text column is missing or holds something else, or the filter does not fit.
    """
    if text_column not in columns:
        raise missing_column(where(), text_column, list(columns))
    text = columns[text_column]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{where()}: the column {text_column!r} holds {type(text).__name__}, not text. "
            "Name the one with the text: --text-column NAME"
        )
    return Record(text, row_filter.values(columns, where) if row_filter is not None else ())


def missing_column(where: str, text_column: str, columns: list[str]) -> DataError:
    """Return the error for a record without the text column; it lists the columns there are."""
    return DataError(
        f"{where}: no column {text_column!r}; there are: {', '.join(columns) or 'none'}. "
        "Name the one with the text: --text-column NAME"
    )


def pack_records(records: Iterable[Record], row_filter: Filter | None, bad: BadRecord) -> Iterator[Texts]:
    """Yield the texts of the records that `row_filter` keeps, packed; `bad` counts the others.

    Where reading the records fails, the texts before the failure come first.
    """
    pending: list[Record] = []
    characters = 0
    try:
        for record in records:
            pending.append(record)
            characters += len(record.text or "")
            if characters >= CHUNK_BYTES or len(pending) >= CHUNK_DOCUMENTS:
                full, pending, characters = pending, [], 0
                yield from pack(_kept_texts(full, row_filter, bad))
    except (OSError, EOFError, zlib.error):
        yield from pack(_kept_texts(pending, row_filter, bad))
        raise
    yield from pack(_kept_texts(pending, row_filter, bad))


def _kept_texts(records: list[Record], row_filter: Filter | None, bad: BadRecord) -> list[str]:
    if row_filter is not None and records:
        table = row_filter.table([record.values for record in records])
        rows = matching_rows(table, row_filter.arrow(table.schema, "records"))
        if len(rows) < len(records):
            bad(FilteredOut(len(records) - len(rows)))
        records = [records[row] for row in rows]
    return [record.text for record in records if record.text is not None]
