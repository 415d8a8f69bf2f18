"""Which documents are for validation: decided by the text alone, so that order and company do not matter."""

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow
import xxhash
from pydantic import BaseModel

from lightlm.data.readers.texts import buffers_of

SPLIT_RULE = (
    "a document is for validation if xxh3_64(its UTF-8 text) mod 2**32 < val_fraction * 2**32; where none is, the one "
    "with the smallest such value; a source of one document is cut near its end, after a line"
)
KEYS = 2**32


def keys_of(texts: pyarrow.Array) -> np.ndarray:
    """The hash that decides each text's split: int64 of shape (texts,), from 0 to 2**32 - 1."""
    offsets, data = buffers_of(texts)
    view = data.data
    hashes = (xxhash.xxh3_64_intdigest(view[a:b]) % KEYS for a, b in itertools.pairwise(offsets.tolist()))
    return np.fromiter(hashes, np.int64, len(texts))


class Candidate(BaseModel):
    """A document that validation gets if no other qualifies: where it is among a block's train tokens."""

    block: int
    key: int
    start: int
    tokens: int
    text_bytes: int


class Span(BaseModel):
    """Consecutive train tokens of a block."""

    block: int
    start: int
    tokens: int


class Holder:
    """Holds one document back as long as none has been for validation: the one with the smallest key so far.

    A document that is held keeps its place in the train stream open; it is put there when a smaller one takes over,
    or right after the first document that is for validation by its own key. So the order of the train stream depends
    on the documents alone, not on how they are shared out over blocks.
    """

    def __init__(self, held: Candidate | None, *, validated: bool) -> None:
        self.held, self.validated = held, validated

    def train_spans(self, block: int, tokens: int, minima: list[Candidate], border: int | None) -> Iterator[Span]:
        """What of a block's train tokens (and of earlier blocks') follows in the train stream.

        `minima` are the block's documents with smaller keys than all before them in it, up to its first one for
        validation, which stands at train token `border` (None where it has none).
        """
        position = 0
        if not self.validated:
            for candidate in minima:
                if self.held is not None and candidate.key >= self.held.key:
                    continue
                yield Span(block=block, start=position, tokens=candidate.start - position)
                yield from self._release()
                self.held, position = candidate, candidate.start + candidate.tokens
            if border is not None:
                yield Span(block=block, start=position, tokens=border - position)
                yield from self._release()
                position, self.validated = border, True
        yield Span(block=block, start=position, tokens=tokens - position)

    def _release(self) -> Iterator[Span]:
        if self.held is not None:
            yield Span(block=self.held.block, start=self.held.start, tokens=self.held.tokens)
            self.held = None
