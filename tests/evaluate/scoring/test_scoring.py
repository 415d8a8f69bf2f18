import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightlm.errors import LightLMError
from lightlm.evaluate.scoring import score as scoring
from lightlm.evaluate.scoring.batches import BatchSize
from lightlm.evaluate.scoring.packing import Tree
from lightlm.evaluate.scoring.score import Score, fp32_logits, score, target_log_probs
from lightlm.model.transformer import Transformer
from tests.shapes import SHAPES, build

Pair = tuple[list[int], list[int]]


def random_pairs(vocab_size: int, longest: int) -> list[Pair]:
    """Ragged pairs: single contexts, contexts shared by several answers, one-token answers, and overlong ones."""
    rng = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(low, high))]

    pairs = [(tokens(1, 20), tokens(1, 12)) for _ in range(6)]
    for _ in range(4):
        context = tokens(1, 20)
        pairs += [(context, tokens(1, 9)) for _ in range(4)]
    overlong = tokens(longest, longest)
    pairs += [
        (overlong, tokens(1, 1)),
        (overlong, tokens(7, 7)),
        (overlong, tokens(7, 7)),
        (tokens(3, 3), tokens(longest, longest)),
    ]
    rng.shuffle(pairs)
    return pairs


@torch.no_grad()
def reference(model: Transformer, pair: Pair) -> Score:
    """One request at a time, all logits, float64: lm-eval's rule for the `hf` model spelled out."""
    context, continuation = pair
    inputs = (context + continuation)[-(model.config.max_seq_len + 1) :][:-1]
    logits = model(torch.tensor([inputs]))[0].double()[-len(continuation) :]
    log_probs = logits.log_softmax(-1)[range(len(continuation)), continuation]
    return Score(float(log_probs.sum()), logits.argmax(-1).tolist() == continuation)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [BatchSize(100), BatchSize(4096), BatchSize(4096, sequences=3)])
def test_scores_are_those_of_single_requests(shape: str, batch_size: BatchSize) -> None:
    model = build(shape)
    pairs = random_pairs(model.config.vocab_size, model.config.max_seq_len)
    done: list[int] = []
    scores = score(model, pairs, batch_size, done.append)
    expected = [reference(model, pair) for pair in pairs]
    assert [s.log_likelihood for s in scores] == pytest.approx([s.log_likelihood for s in expected], abs=1e-3)
    assert [s.greedy for s in scores] == [s.greedy for s in expected]
    assert sum(done) == len(pairs)


def test_greedy_is_true_for_what_the_model_would_write() -> None:
    model = build("llama")
    context = [3, 1, 4]
    written = list(context)
    with torch.no_grad():
        for _ in range(5):
            written.append(int(model(torch.tensor([written]))[0, -1].argmax()))
    answer = written[3:]
    changed = [*answer[:2], (answer[2] + 1) % 97, *answer[3:]]
    right, wrong, prefix = score(model, [(context, answer), (context, changed), (context, answer[:1])], BatchSize(4096))
    assert (right.greedy, wrong.greedy, prefix.greedy) == (True, False, True)


def counted(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns, padding included, of each pass through the model."""
    columns: list[int] = []
    hidden_states = model.hidden_states

    def count(tokens_BT: Tensor, *args: object, **kwargs: object) -> Tensor:
        columns.append(tokens_BT.numel())
        return hidden_states(tokens_BT, *args, **kwargs)

    monkeypatch.setattr(model, "hidden_states", count)
    return columns


@pytest.mark.parametrize(
    ("pairs", "tokens"),
    [
        ([([1] * 20, [2, 3, 4]), ([1] * 20, [5, 6, 7]), ([1] * 20, [2, 8])], 20 + 2 + 2),  # endings of one context
        ([([1] * 20, [letter]) for letter in (2, 3, 4, 5)], 20),  # letters: read off one output
        ([([1, 2, 3, 4, name], [7] * 9) for name in (5, 6)], 4 + 2 * 9),  # WinoGrande: the ending is what they share
        ([([1, 2], [3, 4])] * 5, 3),
    ],
)
def test_each_shared_token_is_computed_once(pairs: list[Pair], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected = [reference(model, pair) for pair in pairs]
    columns = counted(model, monkeypatch)
    scores = score(model, pairs, BatchSize(4096))
    assert sum(columns) == tokens
    assert [s.log_likelihood for s in scores] == pytest.approx([s.log_likelihood for s in expected], abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_examples_before_every_question_are_read_once(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlm.evaluate.scoring.packing._PREFIX_TOKENS", 24)
    monkeypatch.setattr("lightlm.evaluate.scoring.packing._PREFIX_GAIN", 60)
    model = build(shape)
    rng = random.Random(1)
    examples = [rng.randrange(97) for _ in range(30)]
    # Apart at once, and too many for one row of at most 16 tokens.
    pairs = [([*examples, first, *rng.sample(range(97), 5)], rng.sample(range(97), 3)) for first in range(9)]
    expected = [reference(model, pair) for pair in pairs]
    columns = counted(model, monkeypatch)
    scores = score(model, pairs, BatchSize(16))
    assert sum(columns) == 30 + 9 * 8
    assert [s.log_likelihood for s in scores] == pytest.approx([s.log_likelihood for s in expected], abs=1e-3)
    assert [s.greedy for s in scores] == [s.greedy for s in expected]


def test_a_context_longer_than_a_batch_is_still_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlm.evaluate.scoring.packing._PREFIX_TOKENS", 24)
    monkeypatch.setattr("lightlm.evaluate.scoring.packing._PREFIX_GAIN", 60)
    model = build("llama")
    pairs = [([5] * 40, [ending, 1, 2]) for ending in range(4)]
    expected = [reference(model, pair) for pair in pairs]
    columns = counted(model, monkeypatch)
    scores = score(model, pairs, BatchSize(16))
    assert sum(columns) < 40 + 16
    assert [s.log_likelihood for s in scores] == pytest.approx([s.log_likelihood for s in expected], abs=1e-4)


tokens = st.integers(0, 3)  # few, so that much is shared and greedy answers occur
requests = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=60), st.lists(tokens, min_size=1, max_size=8)), max_size=12
)


@settings(max_examples=30)
@given(pairs=requests, sequences=st.sampled_from([1, 7, 64, None]), positions=st.integers(1, 300), data=st.data())
def test_no_batch_and_no_order_changes_a_score(
    pairs: list[Pair], sequences: int | None, positions: int, data: st.DataObject
) -> None:
    for shape in ("gpt2", "llama"):
        model = build(shape)
        order = data.draw(st.permutations(range(len(pairs))))
        scores = score(model, [pairs[i] for i in order], BatchSize(positions, sequences))
        for i, result in zip(order, scores, strict=True):
            expected = reference(model, pairs[i])
            assert result.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-3)
            assert result.greedy == expected.greedy


def test_a_lack_of_memory_halves_the_batches_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    pairs = random_pairs(97, 48)
    whole = score(model, pairs, BatchSize(4096))
    score_batch, sizes = scoring._score_batch, []

    def short_of_memory(model: Transformer, trees: list[Tree], prefix: None) -> Iterator[Score]:
        sizes.append(len(trees) * len(trees[0]))
        if sizes[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score_batch(model, trees, prefix)

    monkeypatch.setattr(scoring, "_score_batch", short_of_memory)
    done: list[int] = []
    scores = score(model, pairs, BatchSize(400), done.append)
    assert [s.log_likelihood for s in scores] == pytest.approx([s.log_likelihood for s in whole], abs=1e-4)
    assert sum(done) == len(pairs)
    assert max(sizes) > 100 >= sizes[-1]


def test_a_number_limits_the_requests_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    score_batch, counts = scoring._score_batch, []

    def count(model: Transformer, trees: list[Tree], prefix: None) -> Iterator[Score]:
        counts.append(sum(len(tree.requests) for tree in trees))
        return score_batch(model, trees, prefix)

    monkeypatch.setattr(scoring, "_score_batch", count)
    pairs = [([1, 2, 3], [answer]) for answer in range(7)] + random_pairs(97, 48)
    score(build("llama"), pairs, BatchSize(4096, sequences=3))
    assert max(counts) == 3
    assert sum(counts) == len(pairs)


def test_a_request_that_memory_cannot_hold_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_fits(*args: object) -> Iterator[Score]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scoring, "_score_batch", nothing_fits)
    with pytest.raises(torch.OutOfMemoryError, match="single request"):
        score(build("llama"), [([1], [2])], BatchSize(4096, 64))


def test_of_equally_likely_tokens_the_first_is_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CHUNK", 4)
    model = build("llama")
    with torch.no_grad():
        model.embed_tokens.weight[[1, 2, 9]] = 5 * torch.ones(32)
    x = torch.ones(1, 32)
    log_probs, greedy = target_log_probs(model, x, torch.zeros(4, dtype=torch.long), torch.tensor([1, 2, 9, 3]))
    assert greedy.tolist() == [True, False, False, False]
    expected = model.head(x)[0].double().log_softmax(-1)[[1, 2, 9, 3]]
    assert log_probs.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_logits_of_bf16_operands_are_not_rounded_to_bf16() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 64).bfloat16(), torch.randn(200, 64).bfloat16()
    setting = torch.get_float32_matmul_precision()
    logits = fp32_logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, atol=1e-4, rtol=0)
    assert torch.get_float32_matmul_precision() == setting


def test_an_answer_longer_than_the_context_is_refused() -> None:
    with pytest.raises(LightLMError, match=r"49 tokens.*48"):
        score(build("llama"), [([1], [2] * 49)], BatchSize(4096))


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(LightLMError, match="empty answer"):
        score(build("llama"), [([1], [2]), ([1], [])], BatchSize(4096))
