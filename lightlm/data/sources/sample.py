"""A sample of a source to train a tokenizer on: the beginnings of its first documents."""

from collections.abc import Callable, Iterable, Iterator

from pyarrow import compute

from lightlm.data.readers.texts import Unit, raise_bad, skippable
from lightlm.errors import DataError

# The first documents, at most 1M characters of each, up to 32M characters in total: merges hardly change beyond that,
# and training takes seconds.
SAMPLE_CHARACTERS = 32_000_000
SAMPLE_DOCUMENT_CHARACTERS = 1_000_000

REPORT_CHARACTERS = 4_000_000


def training_sample(
    units: Iterable[Unit], report: Callable[[int, int], None], *, skip_bad: bool = False
) -> Iterator[str]:
    """Yield the beginnings of the first documents, including validation documents.

    `report` is called with the documents and characters so far.
    """
    total = reported = 0
    for documents, text in enumerate(beginnings(units, skip_bad), start=1):
        sampled = text[: SAMPLE_CHARACTERS - total]
        total += len(sampled)
        if total - reported >= REPORT_CHARACTERS:
            reported = total
            report(documents, total)
        yield sampled
        if total >= SAMPLE_CHARACTERS:
            return


def beginnings(units: Iterable[Unit], skip_bad: bool) -> Iterator[str]:
    """Yield the first `SAMPLE_DOCUMENT_CHARACTERS` of each document."""
    for unit in units:
        beginning: str | None = None  # of a large document
        try:
            for array, unfinished in unit.texts((lambda _: None) if skip_bad else raise_bad):
                if unfinished or beginning is not None:
                    beginning = ((beginning or "") + array[0].as_py())[:SAMPLE_DOCUMENT_CHARACTERS]
                    if not unfinished:
                        yield beginning
                        beginning = None
                else:
                    yield from compute.utf8_slice_codeunits(array, 0, SAMPLE_DOCUMENT_CHARACTERS).to_pylist()
        except DataError as error:
            if not skip_bad:
                raise skippable(error) from error.__cause__
