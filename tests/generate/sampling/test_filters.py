"""Each filter alone and all in a row, against formulas in float64 and against transformers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightlm.generate.sampling import Sampling
from lightlm.generate.sampling.filters import above_share, candidates, nucleus, typical

LOGITS = arrays(np.float32, st.integers(2, 40), elements=st.floats(-8, 8, width=16))
NUCLEUS = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3),
    top_k=st.one_of(st.none(), st.integers(1, 50)),
    top_p=st.floats(0.01, 1),
)


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the probability of each id."""
    probs_BC, ids_BC = candidates(torch.from_numpy(logits)[None], sampling)
    found = np.zeros(len(logits))
    np.add.at(found, ids_BC[0].numpy(), probs_BC[0].numpy())
    return found / found.sum()


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


@given(LOGITS, NUCLEUS)
@settings(max_examples=150)
def test_top_k_and_top_p_leave_the_distribution_of_the_formula(logits: np.ndarray, sampling: Sampling) -> None:
    masses = np.cumsum(reference(logits, Sampling(sampling.temperature, sampling.top_k, 1.0)))
    assume(np.abs(masses - sampling.top_p).min() > 1e-6)  # else rounding decides whether one token more is needed
    found, expected = distribution(logits, sampling), reference(logits, sampling)
    assert np.count_nonzero(found) == len(expected)
    assert sorted(found, reverse=True)[: len(expected)] == pytest.approx(expected, abs=1e-9)
    for index in found.nonzero()[0]:
        assert math.log(found[index]) - math.log(found.max()) == pytest.approx(
            (float(logits[index]) - float(logits.max())) / sampling.temperature, abs=1e-6
        )


@pytest.mark.parametrize("used", ["top_k", "top_p", "min_p", "typical_p", "all"])
def test_filters_leave_what_those_of_transformers_leave(used: str) -> None:
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    for _ in range(60):
        logits = rng.normal(scale=3, size=rng.integers(2, 60))
        chosen = {
            "temperature": float(rng.uniform(0.2, 3)),
            "top_k": int(rng.integers(1, 60)),
            "top_p": float(rng.uniform(0.01, 1)),
            "min_p": float(rng.uniform(0, 0.5)),
            "typical_p": float(rng.uniform(0.01, 0.99)),
        }
        if used != "all":
            chosen = {"temperature": chosen["temperature"], "top_p": 1.0, used: chosen[used]}
        sampling = Sampling(**chosen)
        warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k is not None:
            warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
        warpers.append(transformers.MinPLogitsWarper(sampling.min_p))
        if sampling.typical_p < 1:
            warpers.append(transformers.TypicalLogitsWarper(sampling.typical_p))
        expected = warpers(None, torch.from_numpy(logits)[None]).softmax(-1)[0].numpy()
        assert distribution(logits, sampling) == pytest.approx(expected, abs=1e-9), sampling


@given(LOGITS, st.floats(0, 1))
@settings(max_examples=100)
def test_min_p_keeps_the_tokens_of_at_least_that_share(logits: np.ndarray, min_p: float) -> None:
    probs = np.exp(logits.astype(np.float64) - logits.max())
    kept = above_share(torch.from_numpy(probs)[None], min_p)[0].numpy()
    assert kept.tolist() == [p if p >= min_p else 0 for p in probs]


@given(LOGITS, st.floats(0.01, 0.99))
@settings(max_examples=100)
def test_typical_keeps_the_fewest_nearest_to_the_entropy(logits: np.ndarray, mass: float) -> None:
    weights = np.exp(logits.astype(np.float64))
    probs = weights / weights.sum()
    entropy = -math.fsum(p * math.log(p) for p in probs)
    distances = np.abs(-np.log(probs) - entropy)
    order = np.argsort(distances, kind="stable")
    masses = np.cumsum(probs[order])
    assume(np.abs(masses - mass).min() > 1e-9)
    count = 1 + int((masses < mass).sum())
    kept_BC, columns_BC = typical(torch.from_numpy(weights)[None], mass)
    kept, columns = kept_BC[0].numpy(), columns_BC[0].numpy()
    assert (kept > 0).tolist() == [place < count for place in range(len(logits))]
    assert kept[:count] == pytest.approx(probs[columns[:count]])
    assert distances[columns] == pytest.approx(distances[order], abs=1e-9)


def test_equal_logits_keep_exactly_as_many_as_asked() -> None:
    for sampling, kept in (
        (Sampling(top_k=3, top_p=1.0), 3),
        (Sampling(top_p=0.5), 4),
        (Sampling(top_p=1.0, typical_p=0.5), 4),
    ):
        probs, ids = candidates(torch.zeros(1, 8), sampling)
        assert (probs > 0).sum() == kept
        assert len(set(ids[0].tolist())) == ids.shape[1]


@pytest.mark.parametrize("setting", ["top_p", "typical_p"])
def test_a_nucleus_larger_than_the_first_candidates_is_found_whole(setting: str) -> None:
    logits = torch.zeros(2, 4096)
    logits[1, 7] = 30.0
    probs, ids = candidates(logits, Sampling(1.0, **{"top_p": 1.0, setting: 0.75}))
    assert (probs > 0).sum(-1).tolist() == [3072, 1]
    assert ids[1, probs[1].argmax()] == 7


@given(LOGITS, st.sampled_from(["top_p", "typical_p"]))
@settings(max_examples=50)
def test_the_smallest_settings_keep_one_token(logits: np.ndarray, setting: str) -> None:
    found = distribution(logits, Sampling(**{"top_p": 1.0, setting: 1e-9}))
    assert np.count_nonzero(found) == 1
    if setting == "top_p":
        assert logits[found.argmax()] == logits.max()


def test_a_nucleus_of_nothing_but_zeros_after_the_first() -> None:
    assert nucleus(torch.tensor([[1.0, 0.0, 0.0]]), 1.0).tolist() == [[1, 0, 0]]
