"""Draws: their frequencies, their independence of the other rows, and what is never drawn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.errors import LightLMError
from lightlm.generate.sampling import DEFAULT, GREEDY, Sampling
from lightlm.generate.sampling.draw import Row, log_probs, sample
from tests.generate.sampling.test_filters import LOGITS, NUCLEUS, reference

MIXED = [
    GREEDY,
    DEFAULT,
    Sampling(1.5, top_k=5),
    Sampling(1.0, top_p=1.0, typical_p=0.7, repetition_penalty=1.4),
    Sampling(1.0, min_p=0.1, frequency_penalty=0.5, presence_penalty=0.5),
    Sampling(0.0, no_repeat_ngram=2, logit_bias=((3, 4.0),)),
    DEFAULT,
    Sampling(min_new_tokens=5),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(logits: np.ndarray, sampling: Sampling, count: int, seed: int = 0) -> list[int]:
    row = Row(sampling, generator(seed))
    return [sample(torch.from_numpy(logits)[None], [row])[0] for _ in range(count)]


@given(LOGITS, NUCLEUS, st.integers(0, 2**31))
@settings(max_examples=100)
def test_only_tokens_of_the_top_k_and_the_nucleus_are_drawn(logits: np.ndarray, sampling: Sampling, seed: int) -> None:
    size = len(reference(logits, sampling)) + 1  # one more for a top_p at a rounding's distance
    threshold = sorted(logits, reverse=True)[: min(size, sampling.top_k or size)][-1]
    for token in draw(logits, sampling, 10, seed):
        assert logits[token] >= threshold


def test_frequencies_match_the_distribution() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, 0.5], dtype=np.float32)
    counts = np.bincount(draw(logits, Sampling(temperature=0.7, top_p=1.0), 8000), minlength=5) / 8000
    scaled = np.exp(logits.astype(np.float64) / 0.7)
    assert np.abs(counts - scaled / scaled.sum()).max() < 4 * math.sqrt(0.25 / 8000)


@given(LOGITS)
@settings(max_examples=50)
def test_temperature_0_is_argmax_and_needs_no_randomness(logits: np.ndarray) -> None:
    assert sample(torch.from_numpy(logits)[None], [Row(GREEDY)]) == [int(logits.argmax())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_different_settings_draw_together_what_they_draw_alone(dtype: torch.dtype) -> None:
    logits_BV = (torch.randn(len(MIXED), 300, generator=generator(1)) * 3).to(dtype)
    before = logits_BV.clone()

    def rows() -> list[Row]:
        history = [3, 1, 4, 1, 5, 9, 2, 6]
        return [Row(each, generator(place), history[:4], history[place:], {7}) for place, each in enumerate(MIXED)]

    together = sample(logits_BV, rows())
    assert torch.equal(logits_BV, before)
    assert together == [sample(logits_BV[place : place + 1], [row])[0] for place, row in enumerate(rows())]
    backwards = sample(logits_BV.flip(0), rows()[::-1])
    assert together == backwards[::-1]


@pytest.mark.parametrize("sampling", MIXED)
def test_ids_beyond_the_tokenizer_are_never_drawn(sampling: Sampling) -> None:
    logits_BV = torch.zeros(1, 64)
    logits_BV[:, 50:] = 9.0  # the padding rows of an embedding are the most likely
    row = Row(sampling, generator(), [1, 60], [2], {3})
    assert all(sample(logits_BV, [row], 50)[0] < 50 for _ in range(100))


def test_stop_ids_wait_for_the_minimum() -> None:
    logits_BV = torch.tensor([[0.0, 5.0, 1.0, 9.0]])
    row = Row(Sampling(0.0, min_new_tokens=2), stop_ids={3, 1})
    tokens = []
    for _ in range(3):
        [token] = sample(logits_BV, [row])
        tokens.append(token)
        row.new.append(token)
    assert tokens == [2, 2, 3]


def test_log_probs_are_those_of_the_whole_vocabulary_before_all_settings() -> None:
    logits_BV = torch.randn(3, 40, generator=generator(2)) * 4
    expected = torch.log_softmax(logits_BV.double(), -1)
    found = log_probs(logits_BV, [5, 39, 0], 4, vocab_size=30)
    for row, (token, entry) in enumerate(zip([5, 39, 0], found, strict=True)):
        assert entry.chosen == pytest.approx(float(expected[row, token]), abs=1e-5)
        values, ids = expected[row, :30].topk(4)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert log_probs(logits_BV, [1, 1, 1], 0)[0].top == ()


def test_two_models_that_draw_with_equal_numbers_agree_as_often_as_promised() -> None:
    logits_2V = torch.randn(2, 400, generator=generator(3)) * 2
    logits_2V[1] = logits_2V[0] + 0.5 * logits_2V[1]
    probs_2V = logits_2V.double().softmax(-1)
    distance = float((probs_2V[0] - probs_2V[1]).abs().sum() / 2)
    neutral = Sampling(1.0, top_p=1.0)
    equal = sum(
        len(set(sample(logits_2V, [Row(neutral, generator(seed)), Row(neutral, generator(seed))]))) == 1
        for seed in range(2000)
    )
    assert equal / 2000 > (1 - distance) / (1 + distance) - 0.03
    assert equal / 2000 < 1 - distance + 0.03


def test_draws_of_many_seeds_and_positions_fit_the_distribution() -> None:
    """Whatever the ids are and whichever row draws: chi-square of 40 ids with unequal probabilities."""
    stats = pytest.importorskip("scipy.stats")
    logits_V = torch.linspace(-2, 2, 40)[torch.randperm(40, generator=generator(1))]
    rows = [Row(Sampling(1.0, top_p=1.0), generator(seed)) for seed in range(200)]
    counts = np.zeros(40)
    for _ in range(60):
        counts += np.bincount(sample(logits_V.expand(200, -1), rows), minlength=40)
    assert stats.chisquare(counts, logits_V.double().softmax(-1).numpy() * counts.sum()).pvalue > 0.01


@pytest.mark.parametrize("sampling", [GREEDY, DEFAULT])
def test_a_model_that_computes_nan_is_an_error(sampling: Sampling) -> None:
    logits = torch.randn(2, 10)
    logits[1, 3] = math.nan
    with pytest.raises(LightLMError, match="computes NaN"):
        sample(logits, [Row(sampling, generator()), Row(sampling, generator())])
