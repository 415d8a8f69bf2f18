"""Speculation gives the tokens of plain decoding, whatever the guesses are, and stops where it is slower."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.checkpoint import LoadedModel
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.batch import Batch, NewToken, Request
from lightlm.generate.sampling import GREEDY, Sampling
from lightlm.generate.sampling.draw import Row, sample
from lightlm.generate.speculation import Draft, Guesser, Lookup, Speculation, draft_of
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from tests.shapes import SHAPES, build

DRAWN = Sampling(temperature=1.2, top_p=0.9, repetition_penalty=1.2, min_new_tokens=3)
MODELS = {name: build(name) for name in SHAPES}


class Always:
    """Guess in each round."""

    guesses = True

    def note_plain(self) -> None:
        """Judge nothing."""

    def note_round(self, guesses: int, tokens: int) -> None:
        """Judge nothing."""


class Oracle:
    """Guess what follows in a known text, and something else in a share of all places."""

    facts = "oracle"

    def __init__(self, text: list[int], errors: float) -> None:
        self._text, self._errors, self._random = text, errors, random.Random(0)

    def guess(self, row: Row, count: int) -> list[int]:
        ahead = self._text[len(row.new) : len(row.new) + count]
        return [(token + 1) % 97 if self._random.random() < self._errors else token for token in ahead]


def decode(model: Transformer, request: Request, guesser: Guesser | None = None, count: int = 4) -> list[NewToken]:
    speculation = None if guesser is None else Speculation(guesser, count, Always())
    batch = Batch(model, 1, speculation=speculation, vocab_size=90)
    batch.join([request])
    tokens: list[NewToken] = []
    while batch:
        tokens += batch.step()
    return tokens


def assert_same(found: list[NewToken], expected: list[NewToken]) -> None:
    assert [(token.id, token.finish_reason) for token in found] == [
        (token.id, token.finish_reason) for token in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.log_probs is not None:
            assert ours.log_probs.chosen == pytest.approx(theirs.log_probs.chosen, abs=1e-4)
            assert [token for token, _ in ours.log_probs.top] == [token for token, _ in theirs.log_probs.top]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("errors", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", SHAPES)
def test_right_and_wrong_guesses_give_the_tokens_of_plain_decoding(
    name: str, errors: float, sampling: Sampling
) -> None:
    model = MODELS[name]
    request = Request([5, 9, 2], 25, sampling, seed=3, stop_ids={7, 8}, logprobs=2)
    plain = decode(model, request)
    oracle = Oracle([token.id for token in plain], errors)
    assert_same(decode(model, request, oracle), plain)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["llama", "gpt3", "moe"])
def test_lookup_and_drafts_give_the_tokens_of_plain_decoding(name: str, sampling: Sampling) -> None:
    model = MODELS[name]
    for seed in range(3):
        request = Request([3, 4, 5, 6, 3, 4], 30, sampling, seed)
        plain = decode(model, request)
        for guesser in (Lookup(), Draft(build(name, seed=1), 90), Draft(model, 90)):
            assert_same(decode(model, request, guesser), plain)


def test_a_draft_that_is_the_model_is_always_right() -> None:
    for sampling in (GREEDY, DRAWN):
        speculation = Speculation(Draft(MODELS["llama"], 90), 4, Always())
        batch = Batch(MODELS["llama"], 1, speculation=speculation, vocab_size=90)
        for seed in (1, 2):  # a draft serves one request after the other
            batch.join([Request([5, seed], 20, sampling, seed)])
            while batch:
                batch.step()
        kept, guessed = speculation.take_counts()
        assert kept == guessed > 20
        assert speculation.take_counts() == (0, 0)


def test_a_draft_with_a_shorter_context_stops_guessing() -> None:
    short = Transformer(ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_seq_len=12, vocab_size=97)).eval()
    row = Row(GREEDY, prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    draft = Draft(short, 97)
    assert len(draft.guess(row, 9)) == 3
    assert draft.guess(Row(GREEDY, prompt=[*row.prompt, 1, 2, 3]), 9) == []


def test_the_full_context_ends_a_row_as_without_guesses() -> None:
    model = MODELS["gpt2"]
    context = model.config.max_seq_len
    request = Request([3] * (context - 6), 20, GREEDY)
    plain = decode(model, request)
    assert plain[-1].finish_reason == "context"
    assert_same(decode(model, request, Oracle([token.id for token in plain], 0.2)), plain)


@given(
    texts=st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=8), min_size=2, max_size=4),
    joins=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    leave=st.integers(1, 30),
)
@settings(max_examples=15)
def test_requests_that_join_and_leave_between_guesses_get_their_own_tokens(
    texts: list[list[int]], joins: list[int], leave: int
) -> None:
    model = MODELS["llama"]
    requests = [Request(ids, 12, DRAWN, seed=place) for place, ids in enumerate(texts)]
    expected = [[token.id for token in decode(model, request)] for request in requests]
    batch = Batch(model, 4, speculation=Speculation(Oracle(expected[0], 0.3), 3, Always()), vocab_size=90)
    made: dict[int, list[int]] = {}
    handles: dict[int, int] = {}
    for step in range(60):
        for place, request in enumerate(requests):
            if joins[place] == step:
                [handle] = batch.join([request])
                handles[handle] = place
        if step == leave:
            batch.leave(1)
        for token in batch.step():
            made.setdefault(token.handle, []).append(token.id)
    assert not batch
    for handle, tokens in made.items():
        whole = expected[handles[handle]]
        assert tokens == whole if handle != 1 else tokens == whole[: len(tokens)]


@pytest.mark.parametrize("guesses", ["fixed", "drafted"])
def test_the_distribution_is_that_of_the_model(guesses: str) -> None:
    """Frequencies of two tokens against their exact probabilities, by chi-square; the model is a table of bigrams."""
    stats = pytest.importorskip("scipy.stats")
    table_VV, draft_VV = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=0.9, top_p=1.0)
    probs = (table_VV.double() / 0.9).softmax(-1).numpy()
    expected = probs[0][:, None] * probs
    counts = np.zeros((4, 4))
    speculation = Speculation(Lookup(), 2, Always())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        row = Row(sampling, generator, [0])
        ids = [1, 2]
        if guesses == "drafted":  # from a copy of the generator, as `Draft` does
            copied = torch.Generator()
            copied.set_state(generator.get_state())
            [first] = sample(draft_VV[:1], [Row(sampling, copied)])
            ids = [first, *sample(draft_VV[first : first + 1], [Row(sampling, copied)])]
        while len(row.new) < 2:
            row.new += speculation.keep(table_VV[[[0, *row.new][-1], *ids]], ids, row, None)
            ids = []
        counts[row.new[0], row.new[1]] += 1
    assert stats.chisquare(counts.flatten(), expected.flatten() * counts.sum()).pvalue > 0.01
    assert 0 < speculation.kept < speculation.guessed


def naive_lookup(ids: list[int], count: int) -> list[int]:
    for size in (3, 2):
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == ids[-size:]:
                return ids[start + size : start + size + count]
    return []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 30), st.integers(1, 6))
@settings(max_examples=200)
def test_lookup_returns_what_followed_the_latest_occurrence(ids: list[int], border: int, count: int) -> None:
    row = Row(GREEDY, prompt=ids[:border], new=ids[border:])
    lookup = Lookup()
    assert lookup.guess(row, count) == naive_lookup(ids, count)
    for token in (1, 2, 1, 2, 3):  # as the text grows
        row.new.append(token)
        assert lookup.guess(row, count) == naive_lookup([*ids[:border], *row.new], count)
    other = Row(GREEDY, prompt=ids[:border], new=ids[border:])
    assert lookup.guess(other, count) == naive_lookup(ids, count)


def test_a_draft_has_the_same_tokens_with_the_same_ids() -> None:
    texts = ["the cat sat on the mat " * 9]
    one, same, other = (
        train_tokenizer(texts, 300),
        train_tokenizer(texts, 300),
        train_tokenizer([*texts, "x" * 50], 300),
    )
    target, draft, wrong = (LoadedModel(MODELS["llama"], each, Path("m")) for each in (one, same, other))
    assert isinstance(draft_of(draft, target), Draft)
    with pytest.raises(LightLMError, match="another tokenizer"):
        draft_of(wrong, target)


def test_what_a_row_that_left_has_drawn_ahead_is_not_the_next_rows() -> None:
    model = MODELS["llama"]
    leaving, next_one = Request([5, 9, 2], 25, GREEDY), Request([4, 4, 7], 12, GREEDY)
    expected = [token.id for token in decode(model, leaving)]
    batch = Batch(model, 1, speculation=Speculation(Oracle(expected, 0.0), 4, Always()), vocab_size=90)
    [handle] = batch.join([leaving])
    assert [batch.step()[0].id for _ in range(3)] == expected[:3]  # the first of 5 tokens of a round is the second
    batch.leave(handle)
    batch.join([next_one])
    found: list[NewToken] = []
    while batch:
        found += batch.step()
    assert_same(found, decode(model, next_one))


def test_no_guesses_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="at least 1 guess"):
        Speculation(Lookup(), 0, Always())
