"""The order of a mixture's sources, against counts of its shares in exact numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.mixture import LONGEST_PERIOD, ONE_SOURCE, SourceOrder, Stage, shares_of

weights = st.integers(0, 5) | st.integers(0, 60) | st.decimals(0, 1, places=2).map(float)


@st.composite
def runs(draw: st.DrawFn) -> list[Stage]:
    """One to four stages of one to six sources."""
    sources = draw(st.integers(1, 6))
    mixes = st.lists(weights, min_size=sources, max_size=sources).filter(any).map(shares_of)
    lengths = draw(st.lists(st.integers(1, 8) | st.integers(1, 3000), max_size=3))
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return [Stage(end, draw(mixes)) for end in (*ends, None)]


def sources_of(order: SourceOrder, count: int) -> list[int]:
    return order.locate(np.arange(count))[0].tolist()


@settings(max_examples=60)  # other processes may be at work
@given(stages=runs(), beyond=st.integers(1, 300))
def test_every_prefix_of_a_run_is_within_one_sequence_of_its_shares(stages: list[Stage], beyond: int) -> None:
    sources = len(stages[0].shares)
    order, total = SourceOrder(stages), (stages[-2].end or 0 if len(stages) > 1 else 0) + beyond
    scale = math.lcm(*(share.denominator for stage in stages for share in stage.shares))
    due, counts, stage = [0] * sources, [0] * sources, 0
    numbers, ranks = (part.tolist() for part in order.locate(np.arange(total)))
    for position, (source, rank) in enumerate(zip(numbers, ranks, strict=True)):
        while position == stages[stage].end:
            stage += 1
        seen = {number for part in stages[: stage + 1] for number, share in enumerate(part.shares) if share}
        bound = 1 - Fraction(1, 2 * len(seen) - 2) if len(seen) > 1 else 0  # Tijdeman's, which is the best possible
        due = [have + int(share * scale) for have, share in zip(due, stages[stage].shares, strict=True)]
        assert rank == counts[source]
        counts[source] += 1
        assert max(abs(have - scale * count) for have, count in zip(due, counts, strict=True)) <= bound * scale
    assert order.counts(total).tolist() == counts


@settings(max_examples=60)  # other processes may be at work
@given(stages=runs(), start=st.integers(0, 10**9))
def test_a_position_is_found_without_those_before_it(stages: list[Stage], start: int) -> None:
    order = SourceOrder(stages)
    sources, ranks = order.locate(np.arange(start, start + 50))
    for number, (source, rank) in enumerate(zip(sources.tolist(), ranks.tolist(), strict=True)):
        assert rank == order.counts(start + number)[source]
    assert order.counts(start + 50).sum() == start + 50


def test_two_sources_alternate_by_their_shares() -> None:
    assert sources_of(SourceOrder([Stage(None, shares_of([0.7, 0.3]))]), 10) == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    order = SourceOrder([Stage(3, shares_of([1, 0])), Stage(None, shares_of([0, 1]))])
    assert sources_of(order, 6) == [0, 0, 0, 1, 1, 1]


def test_a_stage_begins_in_the_middle_of_a_run_of_a_hundred_million_sequences() -> None:
    order = SourceOrder([Stage(8 * 10**7, shares_of([0.7, 0.3])), Stage(None, shares_of([0.1, 0.9]))])
    assert order.counts(10**8).tolist() == [58 * 10**6, 42 * 10**6]
    sources, _ = order.locate(np.arange(8 * 10**7 - 1000, 8 * 10**7 + 1000))
    assert [int((part == 0).sum()) for part in np.split(sources, 2)] == [700, 100]


def test_orders_are_compared_by_what_they_gave_so_far() -> None:
    first = shares_of([0.7, 0.3, 0])
    plain = SourceOrder([Stage(None, first[:2])])
    later = SourceOrder([Stage(1000, first), Stage(None, shares_of([0, 0.5, 0.5]))])
    assert plain.same_until(later, 990)
    assert not plain.same_until(later, 1010)
    assert not plain.same_until(SourceOrder([Stage(None, shares_of([0.6, 0.4]))]), 20)


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ([0.1, 0.2], ["1/3", "2/3"]),
        ([3, 0, 1], ["3/4", "0", "1/4"]),
        ([1e-9, 1], [f"1/{LONGEST_PERIOD}", f"{LONGEST_PERIOD - 1}/{LONGEST_PERIOD}"]),
        ([1e300, 1e300], ["1/2", "1/2"]),
    ],
)
def test_weights_are_shares_as_written(given: list[float], shares: list[str]) -> None:
    assert shares_of(given) == tuple(map(Fraction, shares))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(any))
def test_shares_of_any_weights_are_near_them_and_sum_to_one(given: list[float]) -> None:
    shares = shares_of(given)
    assert sum(shares) == 1
    assert [share > 0 for share in shares] == [weight > 0 for weight in given]
    for share, weight in zip(shares, given, strict=True):
        assert float(share) == pytest.approx(weight / sum(given), abs=len(given) / LONGEST_PERIOD)


def test_one_source_counts_its_sequences() -> None:
    assert [part.tolist() for part in ONE_SOURCE.locate(np.array([0, 7, 10**15]))] == [[0, 0, 0], [0, 7, 10**15]]
