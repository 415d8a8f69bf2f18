"""Parquet files, opened by footers that are kept.

Units of one file follow one another, and a footer tells of all its row groups: read again for each, that of
thousands of row groups takes most of the time, and on the Hub a request each.
"""

import functools
from pathlib import Path

import pyarrow.parquet as parquet

from lightlm.data.select.filters import Filter
from lightlm.data.sources.hub import files as hub_files
from lightlm.data.sources.hub.files import HubFile

FOOTERS = 4  # kept per process, as files are read one after the other
LOCAL_BUFFER_BYTES = 1 << 20

File = Path | HubFile


def open_parquet(file: File) -> parquet.ParquetFile:
    """The file, of which nothing is read yet. Raises ArrowException, OSError, HubError."""
    source = file.open(buffering=0) if isinstance(file, HubFile) else file
    # A buffer: else the whole column of a row group, which may be gigabytes, is read before its first page. On the Hub
    # each fill of it is a request.
    buffer = hub_files.PIECE_BYTES if isinstance(file, HubFile) else LOCAL_BUFFER_BYTES
    return parquet.ParquetFile(source, metadata=footer(file), buffer_size=buffer, pre_buffer=False)


def footer(file: File) -> parquet.FileMetaData:
    """What a file says of itself. Raises as `open_parquet`."""
    return _footer(file, _version(file))


def has_matches(file: File, group: int, chosen: Filter) -> bool:
    """Whether a row group may have rows that `chosen` keeps, by its statistics.

    Raises DataError where the file lacks a column, or it cannot be compared so.
    """
    return group in _matching_groups(file, _version(file), chosen)


def _version(file: File) -> tuple[int, int] | None:
    """Changes when a local file does; one on the Hub is of one commit."""
    if isinstance(file, HubFile):
        return None
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=FOOTERS)
def _footer(file: File, version: tuple[int, int] | None) -> parquet.FileMetaData:
    return parquet.read_metadata(file.open(buffering=0) if isinstance(file, HubFile) else file)


@functools.lru_cache(maxsize=FOOTERS)
def _matching_groups(file: File, version: tuple[int, int] | None, chosen: Filter) -> frozenset[int]:
    import pyarrow
    from pyarrow import dataset

    metadata = _footer(file, version)
    expression = chosen.arrow(metadata.schema.to_arrow_schema(), str(file))
    content = pyarrow.BufferOutputStream()  # has all that is asked for, wherever the file itself is
    metadata.write_metadata_file(content)
    fragment = dataset.ParquetFileFormat().make_fragment(pyarrow.BufferReader(content.getvalue()))
    return frozenset(group.id for group in fragment.subset(filter=expression).row_groups)
