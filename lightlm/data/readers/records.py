"""The texts of records with columns: JSON objects, rows of CSV, rows that `datasets` streams."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lightlm.data.chat.conversation import CHAT, ChatColumns
from lightlm.data.readers.texts import NULL, BadRecord, Noted, Omitted
from lightlm.data.select.columns import field_of, has_field
from lightlm.data.select.filters import Filter, without
from lightlm.errors import DataError

LISTED_COLUMNS = 30  # in a message


def texts_of(
    records: Iterable[tuple[Callable[[], str], Any]],
    text_column: str,
    row_filter: Filter | None,
    bad: BadRecord,
    *,
    sparse: bool = False,
) -> Iterator[str]:
    """Yield the texts of records, each given with what names it. A mistake in a record leaves the others."""
    for where, record in records:
        try:
            text = text_of(record, where, text_column, row_filter, bad, sparse=sparse)
        except DataError as error:
            bad(error)
            continue
        if text is not None:
            yield text


def text_of(
    record: Any,
    where: Callable[[], str],
    text_column: str,
    row_filter: Filter | None,
    bad: BadRecord,
    *,
    sparse: bool = False,
) -> str | None:
    """Return the text of a record; None for a null, and where `row_filter` does not keep it: `bad` counts both.

    `sparse` records may lack a column that the filter names, which is then null: writers of JSON omit nulls. `bad`
    counts those that stay, too. Dots in `text_column` lead to nested fields, unless a column has that name. Half a
    surrogate pair becomes U+FFFD.

    Raises:
        DataError: `record` is not a mapping, the text column is missing or holds something else, or the filter does not
            fit; `where()` names the record.
    """
    if not isinstance(record, Mapping):
        held = f"the text under {text_column!r}"
        if isinstance(text_column, ChatColumns):
            held = f"the columns {text_column.wanted}"
        raise DataError(f"{where()}: a JSON object was expected, with {held}")
    if row_filter is not None:
        if not row_filter.keeps(record, where, sparse=sparse):
            bad(Omitted(row_filter.cause(record)))
            return None
        for column in row_filter.lacking(record) if sparse else ():
            bad(Noted(without(column)))
    read = text_column.text_of if isinstance(text_column, ChatColumns) else partial(_text, text_column)
    text = read(record, where)
    if text is None:
        bad(Omitted(NULL))
        return None
    return _valid(text)


def _valid(text: str) -> str:
    """Replace each half of a surrogate pair ("\\ud83d"), which JSON can spell, by U+FFFD."""
    try:
        text.encode("utf-16")  # faster than UTF-8
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text(text_column: str, record: Mapping[str, Any], where: Callable[[], str]) -> str | None:
    """Return the text in a column. Raises DataError."""
    try:
        text = record[text_column] if text_column in record else field_of(record, text_column)
    except KeyError:
        raise missing_column(where(), text_column, _names(record), _hint(record)) from None
    if text is not None and not isinstance(text, str):
        inside = f", for example {text_column}.{next(iter(text))}" if isinstance(text, Mapping) and text else ""
        raise DataError(
            f"{where()}: the column {text_column!r} holds {type(text).__name__}, not text. "
            f"Name the one with the text{inside}: --text-column NAME"
        )
    return text


def holds_column(record: Mapping[str, Any], text_column: str) -> bool:
    """Return whether a record has the text column, by its name or along its dots, or is a conversation."""
    if isinstance(text_column, ChatColumns):
        return text_column.found_in(record)
    return has_field(record, text_column)


def missing_column(where: str, text_column: str, columns: Sequence[str], hint: str = "") -> DataError:
    """Return the error for a record without the text column; it lists the columns there are."""
    more = f", and {len(columns) - LISTED_COLUMNS} more" if len(columns) > LISTED_COLUMNS else ""
    listed = ", ".join(columns[:LISTED_COLUMNS]) + more
    return DataError(
        f"{where}: no column {text_column!r}; there are: {listed or 'none'}. "
        f"Name the one with the text: --text-column NAME{hint}"
    )


def _names(record: Mapping[str, Any]) -> list[str]:
    """Return the columns, each object's fields with dots."""
    names: list[str] = []
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            names += [f"{name}.{inner}" for inner in _names(value)]
        else:
            names.append(str(name))
    return names


def _hint(record: Mapping[str, Any]) -> str:
    """Return what to do with a conversation, or with a list of records under a key, which is not searched."""
    if ChatColumns(CHAT).found_in(record):
        return ". If these are conversations, add --format chat"
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return f". The records in the list under {name!r} are not read; write them as lines: jq -c '.{name}[]' FILE"
    return ""
