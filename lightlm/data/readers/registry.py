"""The file types that can be read. A type is a module here and a row of `_TYPES`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from lightlm.data.readers.delimited import delimited_has_column, delimited_units
from lightlm.data.readers.file import File
from lightlm.data.readers.jsonl import compressed_jsonl_units, json_has_column, jsonl_units
from lightlm.data.readers.opening import COMPRESSIONS
from lightlm.data.readers.parquet import parquet_units
from lightlm.data.readers.plain import plain_units
from lightlm.data.readers.texts import Unit
from lightlm.data.select.filters import Filter

Units = Callable[[File, str, str, Filter | None], Iterator[Unit]]
"""Yields the units of a file: (file, name, text_column, row_filter).

The ids of the units start with `name`. Only records that `row_filter` keeps are read. An error names the file and the
place in it.
"""


class Reader(NamedTuple):
    """A file type.

    Attributes:
        units: its reader.
        has_columns: whether its records have columns; without, a `--filter` cannot judge them.
        holds: (file, text_column): whether the file's records have the text column, for types that often hold other
            things than text, such as settings. In a folder, files without it are left out.
    """

    units: Units
    has_columns: bool = True
    holds: Callable[[File, str], bool] | None = None


_PLAIN = Reader(plain_units, has_columns=False)
_LINES, _COMPRESSED_LINES = Reader(jsonl_units), Reader(compressed_jsonl_units)
_CSV, _TSV = (
    Reader(partial(delimited_units, separators), holds=partial(delimited_has_column, separators))
    for separators in (",;\t|", "\t")
)
# Each type, and its reader where the file is compressed.
_TYPES: dict[str, tuple[Reader, Reader]] = {
    ".txt": (_PLAIN, _PLAIN),
    ".text": (_PLAIN, _PLAIN),
    ".md": (_PLAIN, _PLAIN),
    ".jsonl": (_LINES, _COMPRESSED_LINES),
    ".ndjson": (_LINES, _COMPRESSED_LINES),
    ".json": (_LINES._replace(holds=json_has_column), _COMPRESSED_LINES._replace(holds=json_has_column)),
    ".csv": (_CSV, _CSV),
    ".tsv": (_TSV, _TSV),
}
READERS: dict[str, Reader] = {
    **{suffix: plain for suffix, (plain, _) in _TYPES.items()},
    **{suffix + ending: packed for suffix, (_, packed) in _TYPES.items() for ending in COMPRESSIONS},
    ".parquet": Reader(parquet_units),
}
SUPPORTED = f"{' '.join(_TYPES)} (each also with {' '.join(COMPRESSIONS)}) and .parquet"


def suffix_of(file: File) -> str | None:
    """Return the suffix of `READERS` that a file name ends in, ignoring case; None for a file that cannot be read."""
    name = file.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def reader_of(file: File) -> Reader:
    """Return the reader of a file that has one."""
    return READERS[suffix_of(file) or ""]
