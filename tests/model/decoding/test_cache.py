"""Decoding with the cache gives the logits of one forward pass over the whole sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shapes import SHAPES, build

MODELS = {name: build(name) for name in SHAPES}


@st.composite
def ragged_chunks(draw):
    """Row lengths, and a list of chunks, each giving how many tokens every row takes next."""
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    left, chunks = list(lengths), []
    while any(left):
        chunk = [draw(st.integers(0, min(rest, 9))) for rest in left]
        if not any(chunk):
            chunk = [min(rest, 1) for rest in left]
        chunks.append(chunk)
        left = [rest - count for rest, count in zip(left, chunk, strict=True)]
    return lengths, chunks


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=25)
@given(plan=ragged_chunks(), extra=st.integers(0, 3), seed=st.integers(0, 100))
def test_cached_equals_full_for_any_chunking_of_a_ragged_batch(name, plan, extra, seed):
    model, (lengths, chunks) = MODELS[name], plan
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(97, (length,), generator=generator) for length in lengths]
    # No slack: the longest row fills the cache, so padding columns reach past its end.
    cache = model.new_cache(len(rows), max_len=max(lengths))
    collected = [[] for _ in rows]
    with torch.no_grad():
        for chunk in chunks:
            width = max(chunk) + extra
            tokens = torch.randint(97, (len(rows), width), generator=generator)  # padding is arbitrary
            for b, count in enumerate(chunk):
                start = cache.lengths[b]
                tokens[b, :count] = rows[b][start : start + count]
            logits = model(tokens, cache, None if set(chunk) == {width} else chunk)
            for b, count in enumerate(chunk):
                collected[b].append(logits[b, :count])
        for b, row in enumerate(rows):
            torch.testing.assert_close(torch.cat(collected[b]), model(row[None])[0], atol=2e-5, rtol=1e-4)
    assert cache.lengths == lengths


@pytest.mark.parametrize("name", SHAPES)
def test_selected_rows_continue_correctly(name):
    model = MODELS[name]
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model.new_cache(2)
        model(tokens[:, :7], cache)
        cache.select([1, 1, 0])
        logits = model(tokens[[1, 1, 0], 7:], cache)
        torch.testing.assert_close(logits, model(tokens)[[1, 1, 0], 7:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_follows_the_models_precision(dtype):
    model = build("llama").to(dtype)
    cache = model.new_cache(1)
    assert cache.keys.dtype == dtype
    assert model(torch.tensor([[1, 2, 3]]), cache).dtype == dtype


def test_cache_follows_autocast():
    model = build("qwen3")
    tokens = torch.randint(97, (1, 9))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = model.new_cache(1)
        assert cache.keys.dtype == torch.bfloat16
        steps = torch.cat([model(tokens[:, t : t + 1], cache) for t in range(9)], dim=1)
        torch.testing.assert_close(steps, model(tokens), atol=0.06, rtol=0.05)


def test_overflow_is_refused_and_changes_nothing():
    model = build("llama")
    cache = model.new_cache(1, max_len=4)
    model(torch.tensor([[1, 2, 3]]), cache)
    with pytest.raises(ValueError, match="4 slots, 5 are needed"):
        model(torch.tensor([[1, 2]]), cache)
    assert cache.lengths == [3]
    with pytest.raises(ValueError, match="holds 1 rows"):
        model(torch.tensor([[1], [2]]), cache)


@pytest.mark.parametrize("name", SHAPES)
def test_padding_may_reach_past_the_models_context(name):
    """Row 0 fills the context; row 1's padding columns are at positions past the end of the table."""
    model = MODELS[name]
    tokens = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        cache = model.new_cache(2)
        model(tokens[:, :40], cache, [30, 40])
        logits = model(torch.stack([tokens[0, 30:48], tokens[1, 22:40]]), cache, [18, 8])
        torch.testing.assert_close(logits[0], model(tokens[:1])[0, 30:], atol=2e-5, rtol=1e-4)
    assert cache.lengths == [48, 48]
