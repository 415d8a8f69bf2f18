"""Text of a batch against its tokens, drawn by the plain engine."""

from collections.abc import Sequence

import pytest
import torch

from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import Batch, Request
from lightlm.generate.engine import generate
from lightlm.generate.prompts import encode_prompt, newest
from lightlm.generate.sampling import GREEDY, Sampling
from lightlm.generate.settings import Settings
from lightlm.generate.text import text_of
from lightlm.generate.text_batch import Answer, Question, TextBatch
from lightlm.model.transformer import Transformer
from tests.evaluate.tiny_run import tiny_model
from tests.generate.tokenizers_at_hand import tokenizer_of

CONTEXT = 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of("byte-level", "<s>")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    return tiny_model(tokenizer, max_seq_len=CONTEXT)


def answers_of(model: Transformer, tokenizer: Tokenizer, questions: list[Question]) -> tuple[list[Answer], list[str]]:
    batch = TextBatch(Batch(model, len(questions), vocab_size=tokenizer.vocab_size), tokenizer)
    handles = batch.join(questions)
    shown, answers = dict.fromkeys(handles, ""), {}
    while batch:
        for piece in batch.step():
            shown[piece.handle] += piece.text
            if piece.answer is not None:
                answers[piece.handle] = piece.answer
    assert batch.free == len(questions)
    return [answers[handle] for handle in handles], [shown[handle] for handle in handles]


def test_pieces_are_the_text_of_the_tokens_that_the_engine_draws(model: Transformer, tokenizer: Tokenizer) -> None:
    prompts = [encode_prompt(tokenizer, text) for text in ("the cat", "one", "naïve 日本")]
    sampling = Sampling(temperature=1.3)
    settings = Settings(sampling, max_new_tokens=15, seed=3)
    answers, shown = answers_of(model, tokenizer, [Question(ids, settings, n) for n, ids in enumerate(prompts)])
    ends, size = tokenizer.end_ids, tokenizer.vocab_size
    drawn = generate(model, prompts, 15, sampling, 3, ends, vocab_size=size)
    for ids, answer, text, expected in zip(prompts, answers, shown, drawn, strict=True):
        assert (answer.ids, answer.finish_reason) == (expected.ids, expected.finish_reason)
        assert answer.text == text == text_of(tokenizer, ids, expected.ids)


def test_a_stop_string_ends_one_row_and_frees_it(model: Transformer, tokenizer: Tokenizer) -> None:
    ids = encode_prompt(tokenizer, "the cat")
    [whole], _ = answers_of(model, tokenizer, [Question(ids, Settings(GREEDY, 20))])
    stop = whole.text[4:6]
    settings = Settings(GREEDY, 20, stop=(stop,))
    [stopped, free], shown = answers_of(
        model, tokenizer, [Question(ids, settings), Question(ids, Settings(GREEDY, 20))]
    )
    assert stopped.text == shown[0] == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop) == ("stop", stop)
    assert stopped.ids == whole.ids[: len(stopped.ids)]
    assert len(stopped.ids) < len(whole.ids)
    assert (free.text, free.stop) == (whole.text, None)
    minimum = Settings(Sampling(0.0, min_new_tokens=12), 20, stop=(stop,))
    [late], _ = answers_of(model, tokenizer, [Question(ids, minimum)])
    assert len(late.ids) >= 12


@torch.no_grad()
def test_past_the_context_the_newest_half_is_read_anew(model: Transformer, tokenizer: Tokenizer) -> None:
    ids = encode_prompt(tokenizer, "the cat sat on the mat")
    ends = Settings(GREEDY, 100)
    [short], _ = answers_of(model, tokenizer, [Question(ids, ends)])
    [long], [shown] = answers_of(model, tokenizer, [Question(ids, Settings(GREEDY, 100, sliding_window=True))])
    assert short.finish_reason == "context"
    assert long.ids[: len(short.ids)] == short.ids
    # The plain full forward, with the rule written out.
    read, expected = list(ids), []
    while len(expected) < 100:
        logits_V = model(torch.tensor([read]))[0, -1, : tokenizer.vocab_size]
        token = int(logits_V.argmax())
        if token in tokenizer.end_ids:
            break
        read.append(token)
        expected.append(token)
        if len(read) == CONTEXT + 1:
            read = [ids[0], *read[-(CONTEXT // 2 - 1) :]]
    assert long.ids == expected
    assert long.text == shown == text_of(tokenizer, ids, expected)
    assert newest(tokenizer, ids, 4) == [ids[0], *ids[-3:]]


def test_windows_draw_from_generators_of_their_own(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = encode_prompt(tokenizer, "the")
    settings = Settings(Sampling(2.0, top_p=1.0, min_new_tokens=90), 90, sliding_window=True)
    [first, again, other], _ = answers_of(model, tokenizer, [Question(ids, settings, sample) for sample in (0, 0, 1)])
    assert first.ids == again.ids != other.ids
    assert len(first.ids) == 90
    assert first.ids[45:65] != first.ids[65:85]
    seeds: list[int] = []
    join = Batch.join

    def noted(batch: Batch, requests: Sequence[Request]) -> list[int]:
        seeds.extend(request.seed for request in requests)
        return join(batch, requests)

    monkeypatch.setattr(Batch, "join", noted)
    answers_of(model, tokenizer, [Question(ids, settings)])
    assert len(set(seeds)) == len(seeds) > 2
