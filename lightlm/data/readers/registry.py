"""The file types that can be read. A type is a module here and a row of `READERS`."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lightlm.data.readers.file import File
from lightlm.data.readers.jsonl import compressed_jsonl_units, jsonl_units
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
    """A file type; without columns, a `--filter` cannot judge its records."""

    units: Units
    has_columns: bool = True


READERS: dict[str, Reader] = {
    ".txt": Reader(plain_units, has_columns=False),
    ".md": Reader(plain_units, has_columns=False),
    ".jsonl": Reader(jsonl_units),
    ".jsonl.gz": Reader(compressed_jsonl_units),
    ".jsonl.zst": Reader(compressed_jsonl_units),
    ".parquet": Reader(parquet_units),
}


def suffix_of(file: File) -> str | None:
    """Return the suffix of `READERS` that a file name ends in, ignoring case; None for a file that cannot be read."""
    name = file.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def reader_of(file: File) -> Reader:
    """Return the reader of a file that has one."""
    return READERS[suffix_of(file) or ""]
