"""Texts between readers and encoders: packed in Arrow arrays, large ones in parts.

An Arrow array holds the UTF-8 of its texts end to end, so that work is per megabyte, not per document. A text above
`LARGE_BYTES` travels in parts, so that memory does not grow with it.
"""

import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow

from lightlm.errors import DataError

CHUNK_BYTES = 4 << 20  # texts are packed and encoded in chunks of this size: 15 ms of work, some 40 MB of memory
CHUNK_DOCUMENTS = 20_000
LARGE_BYTES = 8 << 20  # a text above this is encoded in parts
RECORD_BYTES = 256 << 20  # a line of JSON or a cell of Parquet above this is refused

NULL = "null"  # the cause under which the manifest counts records without a text

BadRecord = Callable[[DataError], None]
"""Called by a reader with the mistake in one record: raises it, or counts it and returns. Also called with `Omitted`,
which is not a mistake."""


class Omitted(DataError):  # noqa: N818 - it takes the way of an error and is not one
    """Says how many records are left out, and why: the user asked for it, or they hold no text. See also `Noted`."""

    def __init__(self, cause: str, records: int = 1) -> None:
        super().__init__(f"{records} records: {cause}")
        self.cause, self.records = cause, records


class Noted(Omitted):
    """Says of how many records that stay, too, the user should know."""


def too_large(where: str, what: str) -> DataError:
    """Return the error for a record above `RECORD_BYTES`."""
    return DataError(
        f"{where}: more than {RECORD_BYTES >> 20} MB of {what}, the limit for one record. Store the text as a .txt "
        "file, which may have any size, or skip the record with --skip-bad"
    )


class Texts(NamedTuple):
    """Whole texts (a LargeStringArray without nulls), or one part of a large text.

    With `unfinished`, the array holds one part of a text, and the next `Texts` continues it. The last part, too, is an
    array of its own, with `unfinished` False.
    """

    array: pyarrow.Array
    unfinished: bool = False


Stream = Callable[[BadRecord], Iterator[Texts]]
"""Yields the texts of a unit in their order; called anew for each pass."""


@dataclass(frozen=True)
class Unit:
    """A part of a source that can be read on its own: a file, a block of a file, a row group.

    `id` is unique in the source, and the same in every pass over an unchanged one. Units can be pickled. `size` is the
    bytes on disk, where known: small units are scheduled together, and the progress follows from it.
    """

    id: str
    texts: Stream
    size: int | None = None


def unreadable(error: DataError, bad: BadRecord) -> Iterator[Texts]:
    """Reject what cannot be read at all; `functools.partial` of it with `error` is a `Stream`."""
    bad(error)
    yield from ()


def raise_bad(error: DataError) -> None:
    """Raise the mistake: the `BadRecord` of a run without --skip-bad."""
    if not isinstance(error, Omitted):
        raise skippable(error)


def skippable(error: DataError) -> DataError:
    """Return the error with the option that leaves out what cannot be read."""
    message = str(error).removesuffix(".")
    if "--skip-bad" not in message:
        error.args = (f"{message}. To leave out what cannot be read, add --skip-bad",)
    return error


def pack(texts: Iterable[str]) -> Iterator[Texts]:
    """Yield strings packed into arrays of about `CHUNK_BYTES`. The strings before a failure to read come before it."""
    chunk: list[str] = []
    characters, failure = 0, None
    try:
        for text in texts:
            chunk.append(text)
            characters += len(text)
            if characters >= CHUNK_BYTES or len(chunk) >= CHUNK_DOCUMENTS:
                full, chunk, characters = chunk, [], 0
                yield Texts(pyarrow.array(full, pyarrow.large_string()))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, DataError) as error:
        failure = error
    if chunk:
        yield Texts(pyarrow.array(chunk, pyarrow.large_string()))
    if failure is not None:
        raise failure


def pack_strings(read: Callable[[], Iterable[str]], bad: BadRecord) -> Iterator[Texts]:
    """Yield the strings that `read` gives, packed; `functools.partial` of it with `read` is a `Stream`."""
    return pack(read())


def buffers_of(array: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return (offsets, data) of a LargeStringArray without a copy: int64 of shape (texts + 1,) and uint8."""
    _, offsets, data = array.buffers()
    if not len(array) or offsets is None:
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return ends, np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)


def byte_lengths(array: pyarrow.Array) -> np.ndarray:
    """Return the UTF-8 bytes of each text: int64 of shape (texts,)."""
    return np.diff(buffers_of(array)[0])


def in_chunks(array: pyarrow.Array) -> Iterator[Texts]:
    """Yield whole texts in arrays of at most `CHUNK_BYTES`, or of one text; those above `LARGE_BYTES` in parts."""
    offsets, data = buffers_of(array)
    first = 0
    while first < len(array):
        start, end = int(offsets[first]), int(offsets[first + 1])
        last = first + 1
        if end - start > LARGE_BYTES:
            yield from _parts(data, start, end)
        else:
            fitting = int(np.searchsorted(offsets, start + CHUNK_BYTES, side="right")) - 1
            last = min(max(fitting, last), first + CHUNK_DOCUMENTS, len(array))
            yield Texts(array.slice(first, last - first))
        first = last


def _parts(data: np.ndarray, start: int, end: int) -> Iterator[Texts]:
    """Yield one large text in parts of about `CHUNK_BYTES`, cut between characters."""
    while start < end:
        border = min(start + CHUNK_BYTES, end)
        while border < end and data[border] & 0xC0 == 0x80:  # inside a character
            border += 1
        part = data[start:border].tobytes().decode()
        yield Texts(pyarrow.array([part], pyarrow.large_string()), unfinished=border < end)
        start = border
