"""Blocks of a source: consecutive units that are worked on together, and reading their documents.

A block is the unit of resuming and of sharing out: big enough that its files cost nothing, small enough that little is
lost with it.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow

from lightlm.data.readers.texts import FilteredOut, Texts, Unit, in_chunks
from lightlm.data.select.deduplication import Signer
from lightlm.errors import DataError

BLOCK_BYTES = 4 << 20  # on disk; units below this are put together: 100,000 small files are not 100,000 pieces
BLOCK_UNITS = 10_000

BLANK, UNREADABLE, FILTERED = "blank", "unreadable", "filtered"
LISTED = 100  # messages about bad records that a block keeps; all are counted


class DocumentFilter(Protocol):
    """Says which documents to leave out: the hook for decontamination and the like.

    Called with a unit's id, the number in that unit of the first text, and whole texts; gives a cause for each text to
    leave out, by its index in `texts`. Must be picklable, and its answer depend on its arguments and its own state
    alone. Where it has an attribute `drops` that is False, the texts are only counted and listed. A text above
    `LARGE_BYTES` counts as one in the numbering, but is not passed.
    """

    def __call__(self, unit: str, first: int, texts: pyarrow.Array) -> dict[int, str]: ...


@dataclass(frozen=True)
class Job:
    """What is the same for every block of a preparation; `folder` takes the pieces and may be on shared storage."""

    folder: Path
    tokenizer: Path
    end_of_text_id: int
    encoder: str
    val_fraction: float
    skip_bad: bool = False
    filters: tuple[DocumentFilter, ...] = ()
    signer: Signer | None = None  # then a piece has a table of its documents, see `lightlm.data.prepare.selection`


@dataclass(frozen=True)
class Block:
    """Consecutive units of a source; picklable.

    With `limit`, its documents up to the one that reaches so many tokens. With `only`, it holds the only document of
    the source, which is cut in two.
    """

    number: int
    units: tuple[Unit, ...]
    limit: int | None = None
    only: bool = False

    @property
    def size(self) -> int:
        """Bytes of the source, as far as they are known."""
        return sum(unit.size or 0 for unit in self.units)


def blocks_of(units: Iterable[Unit]) -> Iterator[Block]:
    """Units put together to blocks, the same way in every pass; one of unknown size stands alone."""
    pending: list[Unit] = []
    size = number = 0
    for unit in units:
        unit_size = BLOCK_BYTES if unit.size is None else unit.size
        if pending and (size + unit_size > BLOCK_BYTES or len(pending) >= BLOCK_UNITS):
            yield Block(number, tuple(pending))
            pending, size, number = [], 0, number + 1
        pending.append(unit)
        size += unit_size
    if pending:
        yield Block(number, tuple(pending))


class BlockReader:
    """Reads the documents of a block, and counts those that it leaves out by cause."""

    def __init__(self, job: Job, block: Block) -> None:
        self.dropped: Counter[str] = Counter()
        self.bad: list[str] = []
        self.flagged: Counter[str] = Counter()
        self.listed: list[str] = []
        self._job, self._block = job, block

    def steps(self) -> Iterator[Texts | Iterator[str]]:
        """Whole texts, and each large one as an iterator of its parts, which must be used up before the next step."""
        for unit in self._block.units:
            number = 0
            stream = _resized(unit.texts(self.reject))
            try:
                for texts in stream:
                    if texts.unfinished:
                        yield _parts_of_one(texts, stream)
                        number += 1
                    else:
                        yield self._filtered(unit.id, number, texts)
                        number += len(texts.array)
            except DataError as error:
                self.reject(error)

    def documents(self) -> Iterator[Iterator[str]]:
        """Each document as an iterator of its parts."""
        for step in self.steps():
            if isinstance(step, Texts):
                yield from (iter([text.as_py()]) for text in step.array)
            else:
                yield step

    def visible_documents(self) -> Iterator[Iterator[str]]:
        """Each document that is not blank as an iterator of its parts."""
        for parts in self.documents():
            try:
                lead = _visible(parts)
            except AbandonedError:
                continue
            except DataError as error:
                self.reject(error)
                continue
            if lead is None:
                self.dropped[BLANK] += 1
            else:
                yield lead

    def reject(self, error: DataError) -> None:
        """Raise a mistake, or note it where bad records are skipped; count what a filter leaves out."""
        if isinstance(error, FilteredOut):
            self.dropped[FILTERED] += error.records
            return
        if not self._job.skip_bad:
            raise error
        self.dropped[UNREADABLE] += 1
        if len(self.bad) < LISTED:
            self.bad.append(str(error))

    def _filtered(self, unit: str, first: int, texts: Texts) -> Texts:
        causes: dict[int, str] = {}
        for document_filter in self._job.filters:
            found = document_filter(unit, first, texts.array)
            listed = [f"{unit}, document {first + index}: {cause}" for index, cause in sorted(found.items())]
            self.listed += listed[: LISTED - len(self.listed)]
            if getattr(document_filter, "drops", True):
                causes = found | causes
            else:
                self.flagged.update(found.values())
        if not causes:
            return texts
        self.dropped.update(causes.values())
        kept = np.setdiff1d(np.arange(len(texts.array)), np.fromiter(causes, np.int64))
        return Texts(texts.array.take(pyarrow.array(kept)))


class AbandonedError(Exception):
    """The text that is being read in parts turned out to be bad; its mistake has been noted."""


def _resized(stream: Iterator[Texts]) -> Iterator[Texts]:
    """The same texts, whole ones in chunks, and large ones in parts."""
    inside = False
    for texts in stream:
        if inside or texts.unfinished:
            yield texts
        else:
            yield from in_chunks(texts.array)
        inside = texts.unfinished


def _parts_of_one(texts: Texts, stream: Iterator[Texts]) -> Iterator[str]:
    """The parts of the text that begins with `texts`. Raises AbandonedError, or the reader's DataError."""
    while texts.unfinished:
        yield texts.array[0].as_py()
        texts = next(stream)
    if not len(texts.array):
        raise AbandonedError
    yield texts.array[0].as_py()


def _visible(parts: Iterator[str]) -> Iterator[str] | None:
    """The parts again, or None where they are blank."""
    lead: list[str] = []
    for part in parts:
        lead.append(part)
        if part and not part.isspace():
            return itertools.chain(lead, parts)
    return None
