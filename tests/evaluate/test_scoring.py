import random

import pytest
import torch

from lightlm.errors import LightLMError
from lightlm.evaluate.scoring import BatchSize, Score, score
from lightlm.model.transformer import Transformer
from tests.shapes import SHAPES, build

Pair = tuple[list[int], list[int]]


def random_pairs(vocab_size: int, longest: int) -> list[Pair]:
    """Ragged pairs: contexts alone, contexts that several answers share, one-token answers, and overlong ones."""
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


def test_only_scored_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    rows: list[int] = []
    head = model.head
    monkeypatch.setattr(model, "head", lambda x: rows.append(x.shape[0]) or head(x))
    score(model, [([1] * 30, [2, 3]), ([1] * 30, [4])], BatchSize(4096))
    assert sum(rows) == 3


def test_an_answer_longer_than_the_context_is_refused() -> None:
    with pytest.raises(LightLMError, match=r"49 tokens.*48"):
        score(build("llama"), [([1], [2] * 49)], BatchSize(4096))
