"""Bias, penalties and bans against numpy in float64 and transformers' processors."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.generate.sampling import Sampling
from lightlm.generate.sampling.adjustments import adjust, ban, penalize_counts, penalize_repetition, repeating_tokens

V = 12
IDS = st.lists(st.integers(0, V - 1), max_size=25)


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@given(IDS, st.floats(0.2, 3))
@settings(max_examples=80)
def test_repetition_penalty_is_that_of_the_paper_and_of_transformers(ids: list[int], penalty: float) -> None:
    logits = random_logits()
    found = logits.clone()
    penalize_repetition(found, ids, penalty)
    for token, (before, after) in enumerate(zip(logits.tolist(), found.tolist(), strict=True)):
        factor = 1 if token not in ids else penalty if before < 0 else 1 / penalty
        assert after == pytest.approx(before * factor)
    if ids:
        transformers = pytest.importorskip("transformers")
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.allclose(processor(torch.tensor([ids]), logits[None])[0], found)


@given(IDS, st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=80)
def test_frequency_and_presence_penalties_follow_the_formula_of_the_api(
    ids: list[int], frequency: float, presence: float
) -> None:
    logits = random_logits()
    found = logits.clone()
    penalize_counts(found, ids, frequency, presence)
    counts = Counter(ids)
    expected = [x - counts[j] * frequency - (counts[j] > 0) * presence for j, x in enumerate(logits.tolist())]
    assert found.tolist() == pytest.approx(expected)


@given(st.lists(st.integers(0, 2), max_size=14), st.integers(1, 5))
@settings(max_examples=200)
def test_no_ngram_occurs_twice(ids: list[int], size: int) -> None:
    def ngrams(text: list[int]) -> list[tuple[int, ...]]:
        return [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]

    expected = {token for token in range(3) if len(ids) + 1 >= size and ngrams([*ids, token])[-1] in ngrams(ids)}
    assert set(repeating_tokens(ids, size)) == expected
    if ids:
        transformers = pytest.importorskip("transformers")
        scores = transformers.NoRepeatNGramLogitsProcessor(size)(torch.tensor([ids]), torch.zeros(1, 3))
        assert set((scores[0] == -torch.inf).nonzero()[:, 0].tolist()) == expected


def test_a_ban_of_all_that_is_left_is_lifted() -> None:
    logits = torch.tensor([1.0, -torch.inf, 2.0])
    ban(logits, [0])
    assert logits.tolist() == [-torch.inf, -torch.inf, 2]
    ban(logits, [2])
    assert logits.tolist() == [-torch.inf, -torch.inf, 2]


def test_all_adjustments_in_a_row_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(1)
    for trial in range(40):
        prompt, new = rng.integers(0, V, 6).tolist(), rng.integers(0, V, trial % 7).tolist()
        sampling = Sampling(
            repetition_penalty=float(rng.uniform(0.5, 2)),
            no_repeat_ngram=int(rng.integers(2, 4)),
            logit_bias=((3, 2.5), (5, -100.0)),
            min_new_tokens=4,
        )
        processors = transformers.LogitsProcessorList(
            [
                transformers.SequenceBiasLogitsProcessor([[[3], 2.5], [[5], -100.0]]),
                transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
                transformers.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram),
                transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 4, [0, 7]),
            ]
        )
        logits = random_logits(trial)
        expected = processors(torch.tensor([prompt + new]), logits[None].clone())[0]
        adjust(logits, sampling, prompt, new, {0, 7})
        assert torch.allclose(logits, expected)


def test_penalties_for_counts_ignore_the_prompt_and_those_for_repetition_do_not() -> None:
    for sampling, changed in ((Sampling(presence_penalty=1.0), {4}), (Sampling(repetition_penalty=2.0), {2, 4})):
        logits = torch.ones(V, dtype=torch.float64)
        adjust(logits, sampling, [2], [4], ())
        assert set((logits != 1).nonzero()[:, 0].tolist()) == changed


def test_ids_that_the_logits_lack_are_ignored() -> None:
    logits = torch.ones(V, dtype=torch.float64)
    every = Sampling(
        repetition_penalty=2, frequency_penalty=1, no_repeat_ngram=1, logit_bias=((V, 1.0),), min_new_tokens=9
    )
    adjust(logits, every, [V + 3], [V], {V + 1})
    assert (logits == 1).all()
