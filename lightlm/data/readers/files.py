"""The file types that can be read. A type is a module here and a row of `READERS`."""

from collections.abc import Iterator
from typing import Protocol

from lightlm.data.readers.file import File
from lightlm.data.readers.jsonl import compressed_jsonl_units, jsonl_units
from lightlm.data.readers.parquet import parquet_units
from lightlm.data.readers.plain import plain_units
from lightlm.data.readers.texts import Unit
from lightlm.data.select.filters import Filter


class Reader(Protocol):
    """Yields the units of one file, whose ids start with `name`.

    Only records that `row_filter` keeps are read. An error names the file and the place in it.
    """

    def __call__(self, file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]: ...


READERS: dict[str, Reader] = {
    ".txt": plain_units,
    ".md": plain_units,
    ".jsonl": jsonl_units,
    ".jsonl.gz": compressed_jsonl_units,
    ".jsonl.zst": compressed_jsonl_units,
    ".parquet": parquet_units,
}
WITHOUT_COLUMNS = (plain_units,)  # these have nothing for a `--filter` to judge by


def suffix_of(file: File) -> str | None:
    """Which suffix of `READERS` a file name ends in, ignoring case; None for a file that cannot be read."""
    name = file.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def has_columns(file: File) -> bool:
    """Whether a `--filter` can judge the records of a file."""
    return READERS[suffix_of(file) or ".txt"] not in WITHOUT_COLUMNS


def file_units(file: File, name: str, text_column: str, row_filter: Filter | None = None) -> Iterator[Unit]:
    """Yield the units of one file; `Reader` describes the arguments. Opens Parquet files for their footers."""
    suffix = suffix_of(file)
    assert suffix is not None
    return READERS[suffix](file, name, text_column, row_filter)
