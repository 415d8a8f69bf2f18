"""Batches as a pure function of (seed, epoch, sample index)."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.loader import BatchLoader, permute, validation_batches
from lightlm.data.mixture import SourceOrder, Stage, shares_of
from lightlm.data.shards import TokenStream
from lightlm.errors import DataError


def stream_of(count: int) -> TokenStream:
    """Tokens 0, 1, 2, ... in three shards, so that a token says where it stands."""
    return TokenStream(np.array_split(np.arange(count, dtype="<u4"), 3), end_of_text_id=0)


@pytest.mark.parametrize("mask", [None, []])
def test_an_empty_stream_is_for_scoring_only(mask: list[np.ndarray] | None) -> None:
    stream = TokenStream([], end_of_text_id=0, masks=mask)
    with pytest.raises(DataError, match="books has no train split: it is for scoring models only"):
        BatchLoader({"books": stream}, 4, seed=1)


@given(size=st.integers(1, 3_000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 1_000))
def test_the_order_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


@given(size=st.integers(2**33, 2**62), start=st.integers(0, 2**32))
def test_the_order_of_huge_streams_stays_in_range_without_collisions(size: int, start: int) -> None:
    order = permute(np.arange(start, start + 100), size, seed=1, epoch=0)
    assert order.min() >= 0
    assert order.max() < size
    assert len(set(order.tolist())) == 100


def test_seeds_and_epochs_give_other_orders_and_scatter_neighbors() -> None:
    orders = [permute(np.arange(1000), 1000, seed, epoch) for seed, epoch in [(1, 0), (2, 0), (1, 1)]]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02
        assert (np.abs(np.diff(one)) == 1).mean() < 0.02
        # Far from sorted: the mean distance of a random permutation's entries from their places is a third of its size.
        assert np.abs(one - np.arange(1000)).mean() == pytest.approx(333, abs=40)


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run relies on it: these figures may only change with a note that old runs cannot be resumed."""
    assert permute(np.arange(8), 10, seed=1337, epoch=2).tolist() == [4, 8, 1, 6, 0, 2, 3, 5]


def test_an_epoch_sees_every_window_once_with_targets_shifted_by_one() -> None:
    loader = BatchLoader({"a": stream_of(103)}, seq_len=4, seed=3)
    inputs, targets = loader.batch(0, 25)
    assert inputs.dtype == torch.int64
    assert inputs.shape == (25, 4)
    assert torch.equal(targets, inputs + 1)
    assert sorted(inputs[:, 0].tolist()) == list(range(0, 100, 4))
    again, _ = loader.batch(25, 25)
    assert sorted(again[:, 0].tolist()) == list(range(0, 100, 4))
    assert not torch.equal(again, inputs)


@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=8), restart=st.integers(0, 40))
def test_samples_do_not_depend_on_batch_sizes_or_restarts(parts: list[int], restart: int) -> None:
    whole = BatchLoader({"a": stream_of(50)}, 4, seed=7).batch(0, restart + sum(parts))
    loader = BatchLoader({"a": stream_of(50)}, 4, seed=7)  # as after a restart: it has not seen the samples before
    starts = itertools.accumulate(parts, initial=restart)
    pieces = [loader.batch(start, count) for start, count in zip(starts, parts, strict=False)]
    for index in (0, 1):
        assert torch.equal(torch.cat([piece[index] for piece in pieces]), whole[index][restart:])


def test_ranks_that_each_take_their_part_see_the_global_batch() -> None:
    loader = BatchLoader({"a": stream_of(100)}, 4, seed=7)
    parts = [loader.batch(start, 2)[0] for start in (14, 10, 12)]  # in whatever order they come
    assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), loader.batch(10, 6)[0])


def windows(loader: BatchLoader, start: int, count: int) -> list[int]:
    """The first token of each window, which says where the window stands."""
    return loader.batch(start, count)[0][:, 0].tolist()


def test_each_source_of_a_mixture_is_read_as_if_alone() -> None:
    """The first source exactly as by a run on it; the others in an order of their own."""
    order = SourceOrder([Stage(60, shares_of([2, 1])), Stage(None, shares_of([0, 1]))])
    mixed = BatchLoader({"a": stream_of(103), "b": stream_of(83)}, 4, 7, order)
    numbers, _ = order.locate(np.arange(120))
    inputs, targets = mixed.batch(0, 120)
    assert torch.equal(targets, inputs + 1)
    alone = BatchLoader({"a": stream_of(103)}, 4, 7).batch(0, 40)[0]
    assert torch.equal(inputs[numbers == 0], alone)
    others = inputs[numbers == 1][:, 0].tolist()
    assert len(others) == 80
    for epoch in range(4):  # 20 windows each
        assert sorted(others[20 * epoch : 20 * epoch + 20]) == list(range(0, 80, 4))
    assert others[:20] != windows(BatchLoader({"b": stream_of(83)}, 4, 7), 0, 20)
    assert mixed.epochs(120) == [40 / 25, 4.0]
    parts = [mixed.batch(start, 7)[0] for start in range(0, 119, 7)]
    assert torch.equal(torch.cat(parts), inputs[:119])


@given(count=st.integers(5, 120), seq_len=st.integers(1, 4), seed=st.integers(0, 9))
def test_shifted_windows_begin_elsewhere_in_each_epoch_and_lose_at_most_one(
    count: int, seq_len: int, seed: int
) -> None:
    plain = BatchLoader({"a": stream_of(count)}, seq_len, seed)
    shifted = BatchLoader({"a": stream_of(count)}, seq_len, seed, shift_windows=True)
    first = (count - 1) // seq_len
    later = max(first - 1, 1)
    assert windows(shifted, 0, first) == windows(plain, 0, first)
    offsets = set()
    for epoch in range(20):
        starts = sorted(windows(shifted, first + epoch * later, later))
        offsets.add(starts[0])
        assert starts == list(range(starts[0], starts[0] + later * seq_len, seq_len))
        assert starts[-1] + seq_len < count
    assert max(offsets) <= seq_len
    assert len(offsets) > 1 or seq_len == 1 or first == 1
    assert shifted.epochs(first + 3 * later) == [4.0]


def test_too_few_tokens_are_refused_with_the_numbers() -> None:
    assert BatchLoader({"a": stream_of(9)}, 8, seed=0).epochs(1) == [1.0]
    with pytest.raises(DataError, match=r"8 tokens.* 9"):
        BatchLoader({"a": stream_of(8)}, 8, seed=0)


def test_validation_windows_are_the_first_ones_in_order() -> None:
    batches = list(validation_batches(stream_of(100), seq_len=8, max_tokens=63, batch_size=3))
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert inputs.flatten().tolist() == list(range(56))
    assert torch.equal(torch.cat([targets for _, targets in batches]), inputs + 1)


def test_a_short_validation_stream_gives_one_short_window() -> None:
    ((inputs, targets),) = validation_batches(stream_of(5), seq_len=8, max_tokens=1000, batch_size=3)
    assert inputs.tolist() == [[0, 1, 2, 3]]
    assert targets.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_validation_stream_is_refused_at_once(count: int) -> None:
    with pytest.raises(DataError, match="val-fraction"):
        validation_batches(stream_of(count), seq_len=8, max_tokens=1000, batch_size=3)
