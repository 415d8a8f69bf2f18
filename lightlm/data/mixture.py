"""The order in which a run reads its sources: a pure function of the shares of its stages.

At every prefix of a run, each source is within one sequence of its share, however many sources and stages there are:
Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980). A source is *released* once its
deficit (its share of the sequences so far, minus those it had) reaches 1 / (2n - 2), and *due* before its deficit would
exceed 1 - 1 / (2n - 2), with n the sources of the stages so far: a stage to come changes nothing long before it begins.
The released source that is due first comes next. Deadlines look into the next stages.

Shares are whole parts of a period, and a stage repeats the same short sequence of sources. So an order is a few tables,
and any position is found at once: a run that resumes does not count from its beginning.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 100_000  # sequences; shares that need a longer one are rounded to this many parts


@dataclass(frozen=True)
class Stage:
    """A part of a run: `end` is the sequence at which the next one begins, None in the last stage.

    `shares` has one entry per source, in the same order in all stages; they sum to one.
    """

    end: int | None
    shares: tuple[Fraction, ...]


def shares_of(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Return weights as shares that sum to one: exact as written, or in parts of a `LONGEST_PERIOD`-th.

    The weights are at least 0, finite, and not all 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth, not the nearest binary number
    shares = [weight / sum(exact) for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) <= LONGEST_PERIOD:
        return tuple(shares)
    # Largest remainders; each source keeps at least one part.
    parts = [max(math.floor(share * LONGEST_PERIOD), share > 0) for share in shares]
    for _ in range(LONGEST_PERIOD - sum(parts)):
        parts[max(range(len(parts)), key=lambda n: shares[n] * LONGEST_PERIOD - parts[n])] += 1
    while sum(parts) > LONGEST_PERIOD:
        parts[max(range(len(parts)), key=parts.__getitem__)] -= 1
    return tuple(Fraction(part, LONGEST_PERIOD) for part in parts)


class SourceOrder:
    """Which source each sequence of a run comes from, and which sequence of that source it is."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Take the stages in order; all ends but the last grow."""
        self.stages, self.sources = tuple(stages), len(stages[0].shares)
        self._segments: list[_Segment] = []
        for first, table in _tables(self.stages):
            before = self.counts(first) if first else np.zeros(self.sources, np.int64)
            self._segments.append(_Segment(first, table, before))
            self._firsts = np.array([segment.first for segment in self._segments], np.int64)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sources, ranks) of sequences of the run, int64: a rank counts the source's sequences before it."""
        sources, ranks = np.empty_like(indices), np.empty_like(indices)
        places = np.searchsorted(self._firsts, indices, side="right") - 1
        for place in np.unique(places):
            chosen = places == place
            sources[chosen], ranks[chosen] = self._segments[place].locate(indices[chosen])
        return sources, ranks

    def counts(self, sequences: int) -> np.ndarray:
        """Return the sequences of each source among the run's first `sequences`, int64 of shape (sources,)."""
        place = int(np.searchsorted(self._firsts, sequences, side="right")) - 1
        return self._segments[place].counts(sequences)

    def same_until(self, other: "SourceOrder", sequences: int) -> bool:
        """Return whether two orders agree on the first `sequences`; `other` may have further sources."""
        if self.stages == other.stages:
            return True
        step = 1 << 20
        parts = (np.arange(start, min(start + step, sequences)) for start in range(0, sequences, step))
        return all(np.array_equal(self.locate(part)[0], other.locate(part)[0]) for part in parts)


class _Segment:
    """A table of sources that repeats from sequence `first` on; `before` counts each source's sequences until there."""

    def __init__(self, first: int, table: np.ndarray, before: np.ndarray) -> None:
        self.first, self._table, self._before = first, table, before
        self._round = np.bincount(table, minlength=len(before))  # each source's sequences in one round
        self._ranks = np.empty(len(table), np.int64)
        for source in range(len(before)):
            self._ranks[table == source] = np.arange(self._round[source])

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rounds, places = np.divmod(indices - self.first, len(self._table))
        sources = self._table[places]
        return sources, self._before[sources] + rounds * self._round[sources] + self._ranks[places]

    def counts(self, sequences: int) -> np.ndarray:
        rounds, rest = divmod(sequences - self.first, len(self._table))
        return self._before + rounds * self._round + np.bincount(self._table[:rest], minlength=len(self._before))


def _tables(stages: tuple[Stage, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first sequence, table of sources) of the segments of an order."""
    if len(stages[0].shares) == 1:
        yield 0, np.zeros(1, np.int64)
        return
    assignment = _Assignment(stages)
    for number, stage in enumerate(stages):
        period = math.lcm(*(share.denominator for share in stage.shares))
        first, table = assignment.position, list[int]()
        last_repeat = math.inf if stage.end is None else stage.end - assignment.longest_wait(number)
        seen: dict[tuple[int, ...], int] = {}  # where each state was at the end of a period
        while stage.end is None or assignment.position < stage.end:
            here = assignment.position
            again = seen.setdefault(assignment.state, here) if (here - first) % period == 0 else here
            if again == here or here > last_repeat:
                table.append(assignment.advance(number))
                continue
            if again > first:
                yield first, np.array(table[: again - first])
            yield again, np.array(table[again - first :])
            if stage.end is None:
                return
            assignment.position += (int(last_repeat) - here) // (here - again) * (here - again)
            first, table, last_repeat = assignment.position, [], -1  # the rest, whose deadlines lie in the next stage
        if table:
            yield first, np.array(table)


class _Assignment:
    """Tijdeman's assignment, one sequence after the other. Deficits are whole numbers, `_unit` to a sequence."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self._stages, self.position = stages, 0
        so_far = [
            {n for stage in stages[:end] for n, share in enumerate(stage.shares) if share}
            for end in range(1, len(stages) + 1)
        ]
        parts = [max(2 * len(sources) - 2, 1) for sources in so_far]
        self._unit = math.lcm(*parts) * math.lcm(*(share.denominator for stage in stages for share in stage.shares))
        self._least = [self._unit // part for part in parts]  # deficit of a source that is released, by stage
        self._rates = [[int(share * self._unit) for share in stage.shares] for stage in stages]
        self._deficits = [0] * len(stages[0].shares)

    @property
    def state(self) -> tuple[int, ...]:
        return tuple(self._deficits)

    def longest_wait(self, stage: int) -> int:
        """Return the most sequences between a decision and a deadline that decides it, of sources in this stage."""
        return 2 * self._unit // min(filter(None, self._rates[stage])) + 2

    def advance(self, stage: int) -> int:
        """Return the source of the next sequence, which lies in this stage."""
        self._deficits = [have + rate for have, rate in zip(self._deficits, self._rates[stage], strict=True)]
        released = [source for source, deficit in enumerate(self._deficits) if deficit >= self._least[stage]]
        source = min(released, key=lambda number: self._due(number, stage))
        self._deficits[source] -= self._unit
        self.position += 1
        return source

    def _due(self, source: int, stage: int) -> float:
        """Return the last sequence after which a source that did not come since would not be late."""
        deficit, position = self._deficits[source], self.position
        for rates, least, part in zip(self._rates[stage:], self._least[stage:], self._stages[stage:], strict=True):
            steps = (self._unit - least - deficit) // rates[source] if rates[source] else math.inf
            if part.end is None or position + steps < part.end - 1:
                return position + steps
            deficit += rates[source] * (part.end - 1 - position)
            position = part.end - 1
        return math.inf


ONE_SOURCE = SourceOrder([Stage(None, (Fraction(1),))])
