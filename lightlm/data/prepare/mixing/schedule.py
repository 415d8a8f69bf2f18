"""Mixtures of sources by tokens: which part of which source comes next, and where each is cut.

Think of a source as a line of tokens, stretched by one over its share: in a mixture with shares 0.7 and 0.3, position
100 is token 70 of the first line and token 30 of the second. Portions (the pieces of blocks) follow each other by the
position at which they begin, and all lines are cut at the same position: at the end of the line that ends first, or at
the number of tokens that was asked for. So the result is a function of the sources and the shares alone, exact to a
document in each source; in which order portions are made only decides how many must wait.
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
    """`--mix a=0.7,b=0.3` as sources and their shares, which sum to one; any positive numbers are taken as weights.

    Raises UsageError where it is no such list.
    """
    parts: dict[str, Fraction] = {}
    for item in text.split(","):
        spec, _, weight = item.strip().rpartition("=")
        if not spec:
            raise UsageError(f"--mix {text}: write SOURCE=SHARE in the place of {item.strip()!r}; {_EXAMPLE}")
        if spec in parts:
            raise UsageError(f"--mix {text}: the source {spec} stands there twice")
        parts[spec] = _weight(weight, text)
    if len(parts) < 2:
        raise UsageError(f"--mix {text}: a mixture has at least two sources; {_EXAMPLE}")
    total = sum(parts.values())
    return [(spec, weight / total) for spec, weight in parts.items()]


def _weight(text: str, mix: str) -> Fraction:
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise UsageError(f"--mix {mix}: the share {text!r} is no number above 0; {_EXAMPLE}")
    return weight


@dataclass(frozen=True)
class Portion(Generic[T]):
    """A stretch of one source; the portions of a source come in its order."""

    source: int
    tokens: int
    item: T


class Mixer(Generic[T]):
    """Puts portions in the order of the mixture as they come."""

    def __init__(
        self, shares: Sequence[Fraction], max_tokens: int | None = None, taken: Sequence[int] | None = None
    ) -> None:
        """`taken` is the tokens of the portions of each source that an earlier mixer has arranged, before any cut."""
        self._shares = shares
        self._limit = None if max_tokens is None else Fraction(max_tokens)
        self._waiting: list[deque[tuple[Fraction, Portion[T]]]] = [deque() for _ in shares]
        # The positions up to which portions have come.
        self._ends = [Fraction(done) / share for done, share in zip(taken or [0] * len(shares), shares, strict=True)]

    def arrange(
        self, portions: Iterator[Portion[T]], finished: Callable[[int], bool]
    ) -> Iterator[tuple[Portion[T], int | None]]:
        """The portions in their order, each with the number of tokens to take of it; None for all.

        `finished(source)` says whether all portions of a source have come. Whatever is left when the mixture ends is
        not asked for.
        """
        while True:
            starts = [line[0][0] if line else end for line, end in zip(self._waiting, self._ends, strict=True)]
            source = min(range(len(starts)), key=lambda number: starts[number])
            if self._limit is not None and starts[source] >= self._limit:
                yield from self._at_the_end(self._limit, portions, finished)
                return
            if not self._waiting[source]:
                if not self._fetch(source, portions, finished):
                    self._limit = starts[source]  # this line has ended, and all others have come as far
                continue
            start, portion = self._waiting[source][0]
            end = start + portion.tokens / self._shares[source]
            cut = end if self._limit is None else min(end, self._limit)
            lagging = min(range(len(starts)), key=lambda number: self._ends[number])
            if self._ends[lagging] < cut:
                if not self._fetch(lagging, portions, finished):
                    self._limit = self._ends[lagging]
                continue
            self._waiting[source].popleft()
            yield portion, None if cut == end else math.ceil((cut - start) * self._shares[source])

    def _at_the_end(
        self, end: Fraction, portions: Iterator[Portion[T]], finished: Callable[[int], bool]
    ) -> Iterator[tuple[Portion[T], int | None]]:
        """Portions without tokens that stand where the mixture ends: what they dropped counts, also for a mixer that
        begins here."""
        for source, line in enumerate(self._waiting):
            while line or (self._ends[source] == end and self._fetch(source, portions, finished)):
                start, portion = line.popleft()
                if start > end or portion.tokens:
                    break
                yield portion, None

    def _fetch(self, source: int, portions: Iterator[Portion[T]], finished: Callable[[int], bool]) -> bool:
        """Take portions as they come until one is of `source`; False if it has none left."""
        while not finished(source) and (portion := next(portions, None)) is not None:
            start = self._ends[portion.source]
            self._ends[portion.source] = start + portion.tokens / self._shares[portion.source]
            self._waiting[portion.source].append((start, portion))
            if portion.source == source:
                return True
        return False


class Sized(Protocol):
    """What a schedule hands out: something of so many bytes, which becomes a portion."""

    @property
    def size(self) -> int:
        """Bytes of the source, as far as they are known."""


B = TypeVar("B", bound=Sized)


class Schedule(Generic[B]):
    """Says which portion of which source is to be made next, so that few wait for their turn.

    It judges by what has come so far; it changes nothing in the result.
    """

    def __init__(
        self, sources: Sequence[Iterator[B]], shares: Sequence[Fraction], taken: Sequence[int] | None = None
    ) -> None:
        """`taken` is the tokens that have come of each source already."""
        self._sources, self._shares = sources, [float(share) for share in shares]
        self._next = [next(source, None) for source in sources]
        self._running: list[deque[int]] = [deque() for _ in sources]  # bytes of each that is being made
        self._bytes = [1] * len(sources)  # of those that have come
        self._tokens = [0] * len(sources)
        self._taken = taken or [0] * len(sources)

    def __iter__(self) -> Iterator[tuple[int, B]]:
        """(source, what to make), until every source has ended."""
        while left := [number for number, item in enumerate(self._next) if item is not None]:
            source = min(left, key=self._position)
            item = self._next[source]
            assert item is not None
            self._next[source] = next(self._sources[source], None)
            self._running[source].append(item.size)
            yield source, item

    def arrived(self, source: int, tokens: int) -> None:
        """The first that is being made of a source has become a portion."""
        self._bytes[source] += self._running[source].popleft()
        self._tokens[source] += tokens

    def finished(self, source: int) -> bool:
        """Whether all portions of a source have come."""
        return self._next[source] is None and not self._running[source]

    def _position(self, source: int) -> float:
        """Up to where a source's portions will have come, at its tokens per byte so far; four bytes at first."""
        rate = (self._tokens[source] or 1) / self._bytes[source] if self._bytes[source] > 1 else 0.25
        return (self._taken[source] + self._tokens[source] + rate * sum(self._running[source])) / self._shares[source]
