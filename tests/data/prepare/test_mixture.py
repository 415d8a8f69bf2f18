"""Mixtures by tokens: the order and the cuts, whatever the order in which blocks are made."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.prepare.mixing.schedule import Mixer, Schedule, SourceBlock, parse_mix
from lightlm.errors import UsageError


@dataclass(frozen=True)
class Job:
    source: int
    number: int
    tokens: int
    size: int


def jobs_of(sources: list[list[int]]) -> list[list[Job]]:
    """SourceBlocks of so many tokens; sources differ in bytes per token."""
    return [
        [Job(source, number, tokens, 1 + tokens * (source + 2)) for number, tokens in enumerate(line)]
        for source, line in enumerate(sources)
    ]


def mix(
    sources: list[list[int]],
    shares: list[Fraction],
    max_tokens: int | None,
    ahead: int,
    done: list[tuple[int, int, int]] | None = None,
) -> list[tuple[int, int, int]]:
    """(source, number, tokens taken) in the order of the mixture; `ahead` blocks are being made at any time.

    `done` is what an earlier process has taken.
    """
    counts = [sum(source == number for source, _, _ in done or []) for number in range(len(sources))]
    taken = [sum(line[:count]) for line, count in zip(sources, counts, strict=True)]
    rest = [iter(line[count:]) for line, count in zip(jobs_of(sources), counts, strict=True)]
    schedule = Schedule(rest, shares, taken)

    def engine() -> Iterator[SourceBlock[Job]]:
        running: list[Job] = []
        for _, job in schedule:
            running.append(job)
            if len(running) > ahead:
                yield arrive(running.pop(0))
        while running:
            yield arrive(running.pop(0))

    def arrive(job: Job) -> SourceBlock[Job]:
        schedule.arrived(job.source, job.tokens)
        return SourceBlock(job.source, job.tokens, job)

    arranged = Mixer[Job](shares, max_tokens, taken).arrange(engine(), schedule.finished)
    return [(p.source, p.item.number, p.tokens if limit is None else limit) for p, limit in arranged]


def shares_of(*weights: str) -> list[Fraction]:
    total = sum(Fraction(weight) for weight in weights)
    return [Fraction(weight) / total for weight in weights]


def test_shares_hold_exactly_and_the_shorter_source_ends_the_mixture() -> None:
    result = mix([[100] * 50, [100] * 3], shares_of("0.7", "0.3"), None, 0)
    taken = [sum(tokens for source, _, tokens in result if source == number) for number in (0, 1)]
    assert taken == [700, 300]
    assert [source for source, _, _ in result] == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]


def test_max_tokens_cuts_every_source_at_its_share() -> None:
    result = mix([[1_000], [400, 400]], shares_of("3", "1"), 1_000, 2)
    assert result == [(0, 0, 750), (1, 0, 250)]
    assert mix([[1_000], [400, 400]], shares_of("3", "1"), 10**9, 2) == [(0, 0, 1_000), (1, 0, 334)]


def test_a_source_without_tokens_gives_nothing() -> None:
    assert mix([[], [10, 10]], shares_of("1", "1"), None, 1) == []
    assert sorted(mix([[0, 0, 10], [10]], shares_of("1", "1"), None, 1)) == [
        (0, 0, 0),
        (0, 1, 0),
        (0, 2, 10),
        (1, 0, 10),
    ]


lines = st.lists(st.lists(st.integers(0, 50), max_size=12), min_size=2, max_size=4)


@settings(deadline=None)  # other processes may be at work
@given(sources=lines, seed=st.integers(0, 100), limit=st.none() | st.integers(1, 400))
def test_the_result_depends_on_sources_and_shares_alone(sources: list[list[int]], seed: int, limit: int | None) -> None:
    shares = shares_of(*(str(random.Random(seed + n).randint(1, 9)) for n in range(len(sources))))
    result = mix(sources, shares, limit, 0)
    assert all(mix(sources, shares, limit, ahead) == result for ahead in (1, 3, 100))
    for number in range(len(result)):  # a process that goes on knows only what has been taken
        assert mix(sources, shares, limit, seed % 4, result[:number]) == result[number:]
    end = min(sum(line) / share for line, share in zip(sources, shares, strict=True))
    if limit is not None:
        end = min(end, Fraction(limit))
    for number, (line, share) in enumerate(zip(sources, shares, strict=True)):
        parts = [(index, tokens) for source, index, tokens in result if source == number]
        assert [index for index, _ in parts] == list(range(len(parts)))
        assert sum(tokens for _, tokens in parts) == math.ceil(end * share)
        assert all(tokens == line[index] for index, tokens in parts[:-1])


def test_few_blocks_wait() -> None:
    """Sources of very different tokens per byte: the schedule learns which is behind."""
    sources = [[1_000] * 400, [10] * 4_000]
    shares = shares_of("1", "1")
    schedule = Schedule([iter(line) for line in jobs_of(sources)], shares)
    made = [0, 0]
    waiting: list[int] = []
    for step, (source, job) in enumerate(schedule):
        schedule.arrived(source, job.tokens)
        made[source] += job.tokens
        waiting.append(abs(made[0] - made[1]))
        if step == 2_000:
            break
    assert max(waiting) <= 1_000


def test_a_mixture_is_written_as_sources_and_weights() -> None:
    assert parse_mix("fineweb-edu=0.7, hf:a/b:c=0.3") == [
        ("fineweb-edu", Fraction(7, 10)),
        ("hf:a/b:c", Fraction(3, 10)),
    ]
    assert parse_mix("./a=b.txt=2,c=1") == [("./a=b.txt", Fraction(2, 3)), ("c", Fraction(1, 3))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=1", "at least two sources"),
        ("a,b=1", "SOURCE=SHARE instead of 'a'"),
        ("a=1,b=x", "the share 'x' is not a number above 0"),
        ("a=1,b=0", "the share '0'"),
        ("a=1,b=-1", "the share '-1'"),
        ("a=1,b=1/0", "the share '1/0'"),
        ("a=1,b=nan", "the share 'nan'"),
        ("a=1,a=2", "a is listed twice"),
        ("", "SOURCE=SHARE"),
    ],
)
def test_what_is_no_mixture(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="--mix") as error:
        parse_mix(text)
    assert message in str(error.value)
