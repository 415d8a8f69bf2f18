"""Mixtures of sources by tokens: which block of which source comes next, and where each source is cut.

A source is a line of tokens, stretched by one over its share: with shares 0.7 and 0.3, position 100 is token 70 of the
first line and token 30 of the second. Encoded blocks follow each other by the position at which they begin. All lines
are cut at the same position: at the end of the line that ends first, or at `max_tokens`. So the result depends only on
the sources and the shares, exact to a document in each source. The order in which blocks are encoded only decides how
many must wait.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Protocol, TypeVar

from lightlm.errors import UsageError

T = TypeVar("T")

_EXAMPLE = "for example --mix fineweb-edu=0.7,cosmopedia-v2=0.3"


def parse_mix(text: str) -> list[tuple[str, Fraction]]:
    """Parse `--mix a=0.7,b=0.3` into sources and shares that sum to one; the numbers are positive weights.

    Raises UsageError for anything else.
    """
    parts: dict[str, Fraction] = {}
    for item in text.split(","):
        spec, _, weight = item.strip().rpartition("=")
        if not spec:
            raise UsageError(f"--mix {text}: write SOURCE=SHARE instead of {item.strip()!r}; {_EXAMPLE}")
        if spec in parts:
            raise UsageError(f"--mix {text}: the source {spec} is listed twice")
        try:
            parts[spec] = Fraction(weight)
        except (ValueError, ZeroDivisionError):
            parts[spec] = Fraction(0)
        if parts[spec] <= 0:
            raise UsageError(f"--mix {text}: the share {weight!r} is not a number above 0; {_EXAMPLE}")
    if len(parts) < 2:
        raise UsageError(f"--mix {text}: a mixture needs at least two sources; {_EXAMPLE}")
    total = sum(parts.values())
    return [(spec, weight / total) for spec, weight in parts.items()]


@dataclass(frozen=True)
class SourceBlock(Generic[T]):
    """An encoded block (`item`) of one source, with its tokens; the blocks of a source come in its order."""

    source: int
    tokens: int
    item: T


class Mixer(Generic[T]):
    """Puts blocks in the order of the mixture as they arrive."""

    def __init__(
        self, shares: Sequence[Fraction], max_tokens: int | None = None, taken: Sequence[int] | None = None
    ) -> None:
        """`taken`: the tokens of each source that an earlier process has arranged, before any cut."""
        self._shares = shares
        self._limit = None if max_tokens is None else Fraction(max_tokens)
        self._waiting: list[deque[tuple[Fraction, SourceBlock[T]]]] = [deque() for _ in shares]
        # The position up to which each source has arrived.
        self._ends = [Fraction(done) / share for done, share in zip(taken or [0] * len(shares), shares, strict=True)]

    def arrange(
        self, blocks: Iterator[SourceBlock[T]], finished: Callable[[int], bool]
    ) -> Iterator[tuple[SourceBlock[T], int | None]]:
        """Yield the blocks in order, each with the number of tokens to take of it; None for all.

        `finished(source)` tells whether all blocks of a source have arrived. Blocks after the mixture's end are not
        requested.
        """
        while True:
            starts = [line[0][0] if line else end for line, end in zip(self._waiting, self._ends, strict=True)]
            source = min(range(len(starts)), key=lambda number: starts[number])
            if self._limit is not None and starts[source] >= self._limit:
                yield from self._at_the_end(self._limit, blocks, finished)
                return
            if not self._waiting[source]:
                if not self._fetch(source, blocks, finished):
                    self._limit = starts[source]  # this line has ended, and all others have reached its end
                continue
            start, block = self._waiting[source][0]
            end = start + block.tokens / self._shares[source]
            cut = end if self._limit is None else min(end, self._limit)
            lagging = min(range(len(starts)), key=lambda number: self._ends[number])
            if self._ends[lagging] < cut:
                if not self._fetch(lagging, blocks, finished):
                    self._limit = self._ends[lagging]
                continue
            self._waiting[source].popleft()
            yield block, None if cut == end else math.ceil((cut - start) * self._shares[source])

    def _at_the_end(
        self, end: Fraction, blocks: Iterator[SourceBlock[T]], finished: Callable[[int], bool]
    ) -> Iterator[tuple[SourceBlock[T], int | None]]:
        """Yield the blocks without tokens at the end of the mixture, whose dropped documents count.

        A mixer that resumes here yields the same.
        """
        for source, line in enumerate(self._waiting):
            while line or (self._ends[source] == end and self._fetch(source, blocks, finished)):
                start, block = line.popleft()
                if start > end or block.tokens:
                    break
                yield block, None

    def _fetch(self, source: int, blocks: Iterator[SourceBlock[T]], finished: Callable[[int], bool]) -> bool:
        """Take blocks as they arrive until one is of `source`; return False if none is left."""
        while not finished(source) and (block := next(blocks, None)) is not None:
            start = self._ends[block.source]
            self._ends[block.source] = start + block.tokens / self._shares[block.source]
            self._waiting[block.source].append((start, block))
            if block.source == source:
                return True
        return False


class Sized(Protocol):
    """What a schedule hands out: a block of some bytes."""

    @property
    def size(self) -> int:
        """Bytes of the source, as far as they are known."""


B = TypeVar("B", bound=Sized)


class Schedule(Generic[B]):
    """Decides which source's next block to encode, so that few blocks wait. Does not affect the result."""

    def __init__(
        self, sources: Sequence[Iterator[B]], shares: Sequence[Fraction], taken: Sequence[int] | None = None
    ) -> None:
        """`taken`: the tokens of each source that an earlier process has arranged."""
        self._sources, self._shares = sources, [float(share) for share in shares]
        self._next = [next(source, None) for source in sources]
        self._running: list[deque[int]] = [deque() for _ in sources]  # bytes of each block being encoded
        self._bytes = [1] * len(sources)  # of the blocks that have arrived
        self._tokens = [0] * len(sources)
        self._taken = taken or [0] * len(sources)

    def __iter__(self) -> Iterator[tuple[int, B]]:
        """Yield (source, block) until every source has ended."""
        while left := [number for number, item in enumerate(self._next) if item is not None]:
            source = min(left, key=self._position)
            item = self._next[source]
            assert item is not None
            self._next[source] = next(self._sources[source], None)
            self._running[source].append(item.size)
            yield source, item

    def arrived(self, source: int, tokens: int) -> None:
        """Note that the first running block of a source has arrived, with its tokens."""
        self._bytes[source] += self._running[source].popleft()
        self._tokens[source] += tokens

    def finished(self, source: int) -> bool:
        """Return whether all blocks of a source have arrived."""
        return self._next[source] is None and not self._running[source]

    def _position(self, source: int) -> float:
        """Estimate the position that a source's running blocks reach, from its tokens per byte; 0.25 at first."""
        rate = (self._tokens[source] or 1) / self._bytes[source] if self._bytes[source] > 1 else 0.25
        return (self._taken[source] + self._tokens[source] + rate * sum(self._running[source])) / self._shares[source]
