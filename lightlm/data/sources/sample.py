"""The beginnings of a source's first documents, on which a tokenizer is trained."""

from collections.abc import Callable, Iterable, Iterator

import pyarrow
from pyarrow import compute

from lightlm.data.readers.texts import Unit, raise_bad
from lightlm.errors import DataError

# The first documents, at most 1M characters of each, up to 32M characters in all: merges hardly change beyond, and
# training takes seconds.
SAMPLE_CHARACTERS = 32_000_000
SAMPLE_DOCUMENT_CHARACTERS = 1_000_000

REPORT_CHARACTERS = 4_000_000


def training_sample(
    units: Iterable[Unit], report: Callable[[int, int], None], *, skip_bad: bool = False
) -> Iterator[str]:
    """The beginnings of the first documents; validation documents are among them.

    `report` is called with the documents and characters so far.
    """
    total = reported = 0
    for documents, text in enumerate(beginnings(units, skip_bad), start=1):
        piece = text[: SAMPLE_CHARACTERS - total]
        total += len(piece)
        if total - reported >= REPORT_CHARACTERS:
            reported = total
            report(documents, total)
        yield piece
        if total >= SAMPLE_CHARACTERS:
            return


def beginnings(units: Iterable[Unit], skip_bad: bool) -> Iterator[str]:
    """The first `SAMPLE_DOCUMENT_CHARACTERS` of each document."""
    for unit in units:
        beginning: str | None = None  # of a large document
        try:
            for array, unfinished in unit.texts((lambda _: None) if skip_bad else raise_bad):
                if unfinished or beginning is not None:
                    part = array[0].as_py() if len(array) else ""
                    beginning = ((beginning or "") + part)[:SAMPLE_DOCUMENT_CHARACTERS]
                    if not unfinished:
                        yield beginning
                        beginning = None
                else:
                    yield from _cut(array)
        except DataError:
            if not skip_bad:
                raise


def _cut(array: pyarrow.Array) -> Iterator[str]:
    yield from compute.utf8_slice_codeunits(array, 0, SAMPLE_DOCUMENT_CHARACTERS).to_pylist()
