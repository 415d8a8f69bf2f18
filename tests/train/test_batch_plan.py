import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.recipe import load_recipe
from lightlm.train.schedules import BatchPlan, batch_plan


def plan(*overrides):
    return batch_plan(load_recipe("gpt2-124m", ["schedule={name: constant, warmup: 0%}", *overrides]))


def walk(plan, tokens=0):
    """The run as the trainer goes through it: each batch's first token and sequences."""
    batches = []
    while tokens < plan.tokens:
        batches.append((tokens, plan.sequences(tokens)))
        tokens += batches[-1][1] * plan.seq_len
    return batches, tokens


@st.composite
def plans(draw):
    seq_len, start = draw(st.integers(1, 32)), draw(st.integers(1, 8))
    full = start * draw(st.integers(2, 40))
    tokens = draw(st.integers(1, 20_000))
    warmup = draw(st.integers(1, tokens))
    overrides = [
        f"train.seq_len={seq_len}", f"train.tokens={tokens}", f"train.batch_tokens={full * seq_len}",
        f"schedule.batch_warmup={warmup}", f"schedule.batch_start={start * seq_len}",
    ]  # fmt: skip
    return plan(*overrides), start, full, warmup


def test_one_size_unless_warmed_up():
    fixed = plan("train.tokens=10M")
    assert fixed.stages == ((0, 512),)
    assert fixed.remaining() == (20, 20 * 2**19)
    assert fixed.remaining(19 * 2**19) == (1, 20 * 2**19)
    assert fixed.remaining(20 * 2**19) == (0, 20 * 2**19)


def test_the_batch_doubles_under_gpt3s_line():
    """From 64K to 512K over 7M tokens the line grows by 64K each 1M tokens: it passes 128K at 1M, 256K at 3M."""
    growing = plan("train.tokens=20M", "schedule.batch_warmup=35%", "schedule.batch_start=64K")
    assert growing.stages == ((0, 64), (1_000_000, 128), (3_000_000, 256), (7_000_000, 512))
    batches, _ = walk(growing)
    # A batch that begins under the mark keeps its size: 16 of 65,536 pass 1M, 16 of 131,072 pass 3M, and so on.
    assert [sequences for _, sequences in batches[:49]] == [64] * 16 + [128] * 15 + [256] * 16 + [512] * 2
    assert batches[16][0] == 2**20


def test_a_ratio_that_is_no_power_of_two_ends_at_the_full_batch():
    growing = plan(
        "train.batch_tokens=384K", "train.tokens=20M", "schedule.batch_warmup=5M", "schedule.batch_start=64K"
    )
    assert growing.stages == ((0, 64), (1_000_000, 128), (3_000_000, 256), (5_000_000, 384))


@settings(max_examples=60)
@given(plans())
def test_batches_grow_by_doubling_and_reach_the_full_size(drawn):
    growing, start, full, warmup = drawn
    batches, _ = walk(growing)
    sizes = [sequences for _, sequences in batches]
    assert sizes == sorted(sizes)
    assert sizes[0] == start
    doublings = {start * 2**k for k in range(40) if start * 2**k < full}
    for first, size in batches:
        assert size % start == 0
        assert size in doublings | {full}
        assert (size == full) == (first >= warmup)
        line = start + (full - start) * min(first / warmup, 1.0)
        assert size <= line + 1e-6 * line
        assert size == full or 2 * size > line - 1e-6 * line or 2 * size > full


@settings(max_examples=60)
@given(plans(), st.integers(0, 10**6))
def test_steps_and_tokens_are_those_of_the_walk_from_anywhere_in_it(drawn, choice):
    growing, *_ = drawn
    batches, end = walk(growing)
    assert growing.remaining() == (len(batches), end)
    assert 0 <= end - growing.tokens < batches[-1][1] * growing.seq_len
    step = choice % len(batches)
    assert growing.remaining(batches[step][0]) == (len(batches) - step, end)
    assert walk(growing, batches[step][0])[0] == batches[step:]


def test_marks_that_one_batch_jumps_over_are_skipped():
    jumping = BatchPlan(((0, 4), (1, 8), (2, 16)), seq_len=10, tokens=500)
    assert walk(jumping)[0] == [(0, 4), (40, 16), (200, 16), (360, 16)]
    assert jumping.remaining() == (4, 520)


@pytest.mark.parametrize("micro_batch", ["auto", "32"])
def test_a_recipes_micro_batch_may_exceed_the_first_batches(micro_batch):
    recipe = load_recipe(
        "gpt2-124m", [f"train.micro_batch_size={micro_batch}", "schedule.batch_warmup=1%", "schedule.batch_start=16K"]
    )
    assert batch_plan(recipe).sequences(0) == 16
