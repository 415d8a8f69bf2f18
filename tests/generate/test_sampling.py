import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightlm.errors import UsageError
from lightlm.generate.sampling import Sampling, candidates, sample

LOGITS = arrays(np.float32, st.integers(2, 40), elements=st.floats(-8, 8, width=16))
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3),
    top_k=st.one_of(st.none(), st.integers(1, 50)),
    top_p=st.floats(0.01, 1),
)


def reference(logits: np.ndarray, sampling: Sampling) -> list[float]:
    """Return the sorted probabilities after top-k, then nucleus, computed token by token in float64."""
    scaled = sorted((float(x) / sampling.temperature for x in logits), reverse=True)[: sampling.top_k]
    total = math.fsum(math.exp(x - scaled[0]) for x in scaled)
    kept: list[float] = []
    for x in scaled:
        if kept and math.fsum(kept) >= sampling.top_p - 1e-12:
            break
        kept.append(math.exp(x - scaled[0]) / total)
    return [p / math.fsum(kept) for p in kept]


def draw(logits: np.ndarray, sampling: Sampling, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    row = torch.from_numpy(logits)[None]
    return [sample(row, sampling, [generator])[0] for _ in range(count)]


@given(LOGITS, SAMPLINGS)
@settings(max_examples=150, deadline=None)
def test_the_distribution_is_that_of_the_formula(logits: np.ndarray, sampling: Sampling) -> None:
    masses = np.cumsum(reference(logits, Sampling(sampling.temperature, sampling.top_k, 1.0)))
    assume(np.abs(masses - sampling.top_p).min() > 1e-9)  # else rounding decides whether one token more is needed
    probs, ids = candidates(torch.from_numpy(logits)[None], sampling)
    expected = reference(logits, sampling)
    actual = sorted((probs[0] / probs[0].sum()).tolist(), reverse=True)
    assert actual[: len(expected)] == pytest.approx(expected, abs=1e-9)
    assert not any(actual[len(expected) :])
    for probability, index in zip(probs[0], ids[0], strict=True):
        if probability > 0:
            assert math.log(probability) - math.log(probs[0].max()) == pytest.approx(
                (float(logits[index]) - float(logits.max())) / sampling.temperature, abs=1e-6
            )


@given(LOGITS, SAMPLINGS, st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_only_tokens_of_the_top_k_and_the_nucleus_are_drawn(logits: np.ndarray, sampling: Sampling, seed: int) -> None:
    size = len(reference(logits, sampling)) + 1  # one more for a top_p at a rounding's distance
    threshold = sorted(logits, reverse=True)[: min(size, sampling.top_k or size)][-1]
    for token in draw(logits, sampling, 10, seed):
        assert logits[token] >= threshold


def test_frequencies_match_the_distribution() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, 0.5], dtype=np.float32)
    sampling = Sampling(temperature=0.7, top_p=1.0)
    counts = np.bincount(draw(logits, sampling, 8000), minlength=5) / 8000
    scaled = np.exp(logits.astype(np.float64) / 0.7)
    assert np.abs(counts - scaled / scaled.sum()).max() < 4 * math.sqrt(0.25 / 8000)


@pytest.mark.parametrize(("sampling", "kept"), [(Sampling(top_k=3, top_p=1.0), 3), (Sampling(top_p=0.5), 4)])
def test_equal_logits_keep_exactly_as_many_as_asked(sampling: Sampling, kept: int) -> None:
    probs, ids = candidates(torch.zeros(1, 8), sampling)
    assert (probs > 0).sum() == kept
    assert len(set(ids[0].tolist())) == ids.shape[1]


def test_a_tiny_top_p_keeps_the_most_likely_token() -> None:
    assert set(draw(np.array([0.0, 3.0, 1.0], dtype=np.float32), Sampling(top_p=1e-9), 20)) == {1}


def test_a_nucleus_larger_than_the_first_candidates_is_found_whole() -> None:
    logits = torch.zeros(2, 4096)
    logits[1, 7] = 30.0
    probs, _ = candidates(logits, Sampling(temperature=1.0, top_p=0.75))
    assert (probs > 0).sum(-1).tolist() == [3072, 1]


@given(LOGITS)
@settings(max_examples=50, deadline=None)
def test_temperature_0_is_argmax_and_needs_no_randomness(logits: np.ndarray) -> None:
    assert sample(torch.from_numpy(logits)[None], Sampling(temperature=0), []) == [int(logits.argmax())]


def test_equal_seeds_draw_equal_tokens_whatever_the_other_rows_are() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    together = sample(logits, Sampling(temperature=2), generators)
    alone = [
        sample(logits[row : row + 1], Sampling(temperature=2), [torch.Generator().manual_seed(5 + row)])
        for row in range(3)
    ]
    assert [[token] for token in together] == alone


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.01}, "top-p"),
    ],
)
def test_values_out_of_range_are_named(values: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Sampling(**values)
