"""Text of a batch against its tokens, drawn by the plain engine."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import Batch, FinishReason, NewToken, Request
from lightlm.generate.engine import generate
from lightlm.generate.prompts import encode_prompt, newest
from lightlm.generate.sampling import GREEDY, Sampling
from lightlm.generate.settings import Settings
from lightlm.generate.text import text_of
from lightlm.generate.text_batch import Answer, Piece, Question, TextBatch
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


class Scripted(Batch):
    """A batch of one row that draws the tokens of a script."""

    def __init__(self, model: Transformer, ids: Sequence[int], end: FinishReason = "length") -> None:
        super().__init__(model, 1)
        self._script, self._end = iter(ids), end
        self._left = len(ids)

    def step(self) -> list[NewToken]:
        self._left -= 1
        handle = self._handles - 1
        return [NewToken(handle, next(self._script), None if self._left else self._end)]


def pieces_of(
    tokenizer: Tokenizer, model: Transformer, ids: list[int], stops: tuple[str, ...], end: FinishReason = "length"
) -> list[Piece]:
    batch = TextBatch(Scripted(model, ids, end), tokenizer)
    batch.join([Question([tokenizer.start_id], Settings(stop=stops))])
    pieces: list[Piece] = []
    while batch:
        pieces += batch.step()
    return pieces


STOPS = st.lists(st.sampled_from(["cat", "at", "the", " s", "e d", "o", "one two", "\ufffd", "日", "Ω"]), max_size=3)


@given(ids=st.lists(st.integers(0, 305), min_size=1, max_size=40), stops=STOPS, real=st.booleans())
def test_pieces_join_to_the_decoded_text_and_tell_each_token_where_its_text_begins(
    model: Transformer, tokenizer: Tokenizer, ids: list[int], stops: list[str], real: bool
) -> None:
    if real:
        ids = tokenizer.encode("the cat sat on the mat, naïve 日本語 one two" * 2)[: 2 * len(ids)] + ids
    ids = [token for token in ids if token not in tokenizer.special_tokens] or [300]
    pieces = pieces_of(tokenizer, model, ids, tuple(stops))
    full = tokenizer.decode(ids)
    cuts = [full.find(stop) for stop in stops if stop in full]
    expected = full[: min(cuts)] if cuts else full
    assert "".join(piece.text for piece in pieces) == expected
    answer = pieces[-1].answer
    assert answer is not None
    assert (answer.text, answer.finish_reason) == (expected, "stop" if cuts else "length")
    assert all(piece.answer is None for piece in pieces[:-1])
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.id for token in tokens] == ids[: len(tokens)]
    assert cuts or len(tokens) == len(ids)
    for before, token in enumerate(tokens):  # a token inside a character begins with the character
        begin = tokenizer.decode(ids[:before])
        assert token.offset == len(begin.rstrip("\ufffd")) or begin.endswith("\ufffd")
    start = 0
    for piece in pieces:
        end = start + len(piece.text)
        assert all(start <= token.offset < end + (piece is pieces[-1]) for token in piece.tokens)
        start = end


def test_a_token_whose_text_waits_is_told_with_its_text(model: Transformer, tokenizer: Tokenizer) -> None:
    [c] = tokenizer.encode("c")
    first, second, *_ = pieces_of(tokenizer, model, [c, c, c], ("cats",))
    assert (first.text, first.tokens) == ("", ())
    assert (second.text, [token.offset for token in second.tokens]) == ("c", [0])


def test_a_stop_token_is_not_part_of_an_answer(model: Transformer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    *_, last = pieces_of(tokenizer, model, [*ids, tokenizer.end_of_text_id], (" cats",), end="stop")
    assert last.answer is not None
    assert (last.answer.text, last.answer.ids, last.answer.finish_reason) == ("the cat", ids, "stop")
    assert last.text == " cat"  # it waited, and is told with its tokens
    assert last.tokens


def test_a_row_that_leaves_is_free_and_the_others_continue(model: Transformer, tokenizer: Tokenizer) -> None:
    question = Question(encode_prompt(tokenizer, "the cat"), Settings(GREEDY, 9))
    [[alone], _] = answers_of(model, tokenizer, [question])
    batch = TextBatch(Batch(model, 2, vocab_size=tokenizer.vocab_size), tokenizer)
    first, second = batch.join([question, question])
    batch.step()
    batch.leave(first)
    batch.leave(first)
    assert (batch.free, len(batch)) == (1, 1)
    [third] = batch.join([question])
    answers: dict[int, Answer] = {}
    while batch:
        answers |= {piece.handle: piece.answer for piece in batch.step() if piece.answer is not None}
    assert {handle: answer.ids for handle, answer in answers.items()} == {second: alone.ids, third: alone.ids}
