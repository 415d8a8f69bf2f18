"""The texts of records with columns: lines of JSON, rows that `datasets` streams."""

from collections.abc import Callable, Mapping
from typing import Any

from lightlm.data.readers.texts import BadRecord, FilteredOut
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError


def text_of(
    record: Any, where: Callable[[], str], text_column: str, row_filter: Filter | None, bad: BadRecord
) -> str | None:
    """Return the text of a record; None for a null, and where `row_filter` does not keep it, which `bad` counts.

    Raises DataError where `record` is not a mapping, the text column is missing or holds something else, or the filter
    does not fit; `where()` names the record.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where()}: a JSON object was expected, with the text under {text_column!r}")
    if text_column not in record:
        raise missing_column(where(), text_column, list(record))
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{where()}: the column {text_column!r} holds {type(text).__name__}, not text. "
            "Name the one with the text: --text-column NAME"
        )
    if row_filter is not None and not row_filter.keeps(record, where):
        bad(FilteredOut())
        return None
    return text


def missing_column(where: str, text_column: str, columns: list[str]) -> DataError:
    """Return the error for a record without the text column; it lists the columns there are."""
    return DataError(
        f"{where}: no column {text_column!r}; there are: {', '.join(columns) or 'none'}. "
        "Name the one with the text: --text-column NAME"
    )
