"""Blocks of a source: consecutive units that are encoded together, and the documents in them.

A block is what a worker takes and what an interrupted preparation keeps: large enough that its files cost nothing,
small enough that little is lost with it.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow
import xxhash

from lightlm.data.prepare.encoded_block import LeftOut
from lightlm.data.readers.texts import LARGE_BYTES, Noted, Omitted, Texts, Unit, buffers_of, in_chunks, skippable
from lightlm.data.select.deduplication import Signer
from lightlm.data.shards import TrainOn
from lightlm.errors import DataError

BLOCK_BYTES = 4 << 20  # on disk; smaller units share a block, so that 100,000 small files are not 100,000 blocks
BLOCK_UNITS = 10_000

BLANK, UNREADABLE = "blank", "unreadable"
# Documents that are counted, because a search does not cover them.
TOO_LARGE = f"above {LARGE_BYTES >> 20} MB, not searched for evaluation sets"
ONLY_EXACT = f"above {LARGE_BYTES >> 20} MB, only searched for exact duplicates"
HOLDS_NUL = "with NUL characters"  # escaped in JSON or in Parquet; mostly UTF-16 that was read as something else
LISTED = 100  # messages about bad records that a block keeps; all are counted

HASHES = 2**32


def split_hashes(texts: pyarrow.Array) -> np.ndarray:
    """Return the hash that decides each text's split: int64 of shape (texts,), from 0 to `HASHES` - 1."""
    offsets, data = buffers_of(texts)
    view = data.data
    hashes = (xxhash.xxh3_64_intdigest(view[a:b]) % HASHES for a, b in itertools.pairwise(offsets.tolist()))
    return np.fromiter(hashes, np.int64, len(texts))


class DocumentFilter(Protocol):
    """Decides which documents to leave out, for example contaminated ones.

    Takes a unit's id, the number in that unit of the first text, and complete texts. Returns a cause for each text to
    leave out, by its index in `texts`. Must be picklable, and its answer may depend only on its arguments and its own
    state. If its attribute `drops` is False, the texts are counted and listed, and stay. A text above `LARGE_BYTES` is
    numbered, but not passed; it is counted and listed as `TOO_LARGE`.
    """

    def __call__(self, unit: str, first: int, texts: pyarrow.Array) -> dict[int, str]: ...


@dataclass(frozen=True)
class Job:
    """What all blocks of a preparation share; `folder` takes the encoded blocks and may be on shared storage."""

    folder: Path
    tokenizer: Path
    encoder: str
    val_fraction: float
    skip_bad: bool = False
    filters: tuple[DocumentFilter, ...] = ()
    end_of_text_id: int | None = None  # None: the tokenizer's, by the known names
    train_on: TrainOn | None = None  # if given, texts are conversations, see `lightlm.data.chat.conversation`
    signer: Signer | None = None  # if given, blocks list their documents, see `lightlm.data.prepare.selection`


@dataclass(frozen=True)
class Block:
    """Consecutive units of a source; picklable. `limit` stops after the document that reaches so many tokens."""

    number: int
    units: tuple[Unit, ...]
    limit: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the source, as far as they are known."""
        return sum(unit.size or 0 for unit in self.units)


def blocks_of(units: Iterable[Unit]) -> Iterator[Block]:
    """Yield units as blocks, the same way in each pass; a unit of unknown size is a block."""
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
    """Reads the documents of a block, and adds those that it leaves out to `left_out`."""

    def __init__(self, job: Job, block: Block, left_out: LeftOut) -> None:
        self._job, self._block, self._left_out = job, block, left_out

    def texts(self) -> Iterator[Texts | Iterator[str]]:
        """Yield complete texts, and each large one as an iterator of its parts, to be used up before the next."""
        for unit in self._block.units:
            number = 0
            stream = _resized(unit.texts(self.reject))
            try:
                for texts in stream:
                    if texts.unfinished:
                        self._note_large(f"{unit.id}, document {number}")
                        yield _parts_of_one(texts, stream)
                        number += 1
                    else:
                        yield self._filtered(unit.id, number, texts)
                        number += len(texts.array)
            except DataError as error:
                self.reject(error)

    def reject(self, error: DataError) -> None:
        """Raise an error in the source, or count it if bad records are skipped; count what the reader leaves out."""
        if isinstance(error, Noted):
            self._left_out.flag(error.cause, error.records)
        elif isinstance(error, Omitted):
            self._left_out.drop(error.cause, error.records)
        elif self._job.skip_bad:
            message = str(error).encode("utf-8", "backslashreplace").decode()  # it may quote half of a surrogate pair
            self._left_out.add(LeftOut(dropped={UNREADABLE: 1}, bad=[message]), LISTED)
        else:
            raise skippable(error)

    def _note_large(self, document: str) -> None:
        """Count a document that is too large for the searches of the job."""
        signer = self._job.signer
        searches = {TOO_LARGE: bool(self._job.filters), ONLY_EXACT: signer is not None and signer.mode == "near"}
        for cause, wanted in searches.items():
            if wanted:
                self._left_out.add(LeftOut(flagged={cause: 1}, listed=[f"{document}: {cause}"]), LISTED)

    def _note_nul(self, texts: pyarrow.Array) -> None:
        """Count the texts with NUL characters, which are kept."""
        offsets, data = buffers_of(texts)
        nul = np.flatnonzero(data[offsets[0] : offsets[-1]] == 0) + offsets[0]
        if nul.size:
            holders = np.unique(np.searchsorted(offsets, nul, side="right"))
            self._left_out.add(LeftOut(flagged={HOLDS_NUL: holders.size}), 0)

    def _filtered(self, unit: str, first: int, texts: Texts) -> Texts:
        causes: dict[int, str] = {}
        self._note_nul(texts.array)
        for document_filter in self._job.filters:
            found = document_filter(unit, first, texts.array)
            listed = [f"{unit}, document {first + index}: {cause}" for index, cause in sorted(found.items())]
            drops = getattr(document_filter, "drops", True)
            flagged = {} if drops else dict(Counter(found.values()))
            self._left_out.add(LeftOut(flagged=flagged, listed=listed), LISTED)
            causes = found | causes if drops else causes
        if not causes:
            return texts
        self._left_out.add(LeftOut(dropped=dict(Counter(causes.values()))), 0)
        kept = np.setdiff1d(np.arange(len(texts.array)), np.fromiter(causes, np.int64))
        return Texts(texts.array.take(pyarrow.array(kept)))


def _resized(stream: Iterator[Texts]) -> Iterator[Texts]:
    """Yield the same texts: complete ones in chunks, large ones in parts."""
    inside = False
    for texts in stream:
        if inside or texts.unfinished:
            yield texts
        else:
            yield from in_chunks(texts.array)
        inside = texts.unfinished


def _parts_of_one(texts: Texts, stream: Iterator[Texts]) -> Iterator[str]:
    """Yield the parts of the text that begins with `texts`. Raises the reader's DataError."""
    while texts.unfinished:
        yield texts.array[0].as_py()
        texts = next(stream)
    yield texts.array[0].as_py()
