"""Streamed text against decoding everything at once."""

from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import UsageError
from lightlm.generate.text import TextStream, text_of
from tests.generate.tokenizers_at_hand import KINDS, TEXTS, tokenizer_of

WORDS = st.text("the cats on mat,日é🙂\n", max_size=40)
IDS = st.lists(st.integers(0, 500), max_size=30)


def pieces_of(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*map(stream.push, ids), stream.flush()]


def added(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    """What the answer adds to the text of the prompt, decoded at once."""
    before, together = tokenizer.decode(prompt), tokenizer.decode(prompt + answer)
    assert together.startswith(before)
    return together[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@given(st.sampled_from(["", "the", "one two", "naïve 日本語", "it,\n"]), WORDS)
@settings(max_examples=150)
def test_pieces_are_the_text_that_decoding_prompt_and_answer_together_gives(kind: str, prompt: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    before, answer = tokenizer.encode(prompt), tokenizer.encode(text)
    pieces = pieces_of(TextStream(tokenizer, before), answer)
    assert "".join(pieces) == added(tokenizer, before, answer) == text_of(tokenizer, before, answer)
    assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(IDS, IDS)
@settings(max_examples=150)
def test_any_tokens_stream_as_they_decode(kind: str, prompt: list[int], answer: list[int]) -> None:
    """Also special tokens and, with bytes as tokens, broken characters.

    A sentencepiece decoder reads all bytes in a row as broken if one of them is, also those already shown.
    """
    tokenizer = tokenizer_of(kind)
    prompt, answer = ([token for token in ids if token < tokenizer.vocab_size] for ids in (prompt, answer))
    assume(not tokenizer.decode(prompt).endswith("�"))  # the answer may complete a character of the prompt
    assume(kind != "metaspace" or "�" not in tokenizer.decode(prompt + answer))
    assert "".join(pieces_of(TextStream(tokenizer, prompt), answer)) == added(tokenizer, prompt, answer)


def test_the_first_space_of_a_sentencepiece_answer_stays() -> None:
    tokenizer = tokenizer_of("metaspace")
    prompt, answer = tokenizer.encode("one two"), tokenizer.encode("three")
    assert tokenizer.decode(answer) == "three"
    assert text_of(tokenizer, prompt, answer) == " three"


def test_an_answer_may_complete_a_character_of_the_prompt() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("🙁")
    assert len(ids) > 1
    assert text_of(tokenizer, ids[:-1], ids[-1:]) == "🙁"


@pytest.mark.parametrize("kind", KINDS)
@given(WORDS, st.lists(st.text("the cats日", min_size=1, max_size=5), max_size=3))
@settings(max_examples=200)
def test_a_stop_string_ends_the_text_and_is_never_shown(kind: str, text: str, stops: list[str]) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    stream = TextStream(tokenizer, (), stops)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stop is not None:
            break
    shown = "".join([*pieces, stream.flush()])
    assert whole.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if stream.stop is None:
        assert shown == whole
        assert not any(stop in whole for stop in stops)
    else:
        assert whole[len(shown) :].startswith(stream.stop)


@given(WORDS, st.text("the cats", min_size=1, max_size=4))
@settings(max_examples=100)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(text: str, stop: str) -> None:
    tokenizer = tokenizer_of("byte-level")
    stream, shown, seen = TextStream(tokenizer, (), [stop]), "", []
    for token in tokenizer.encode(text):
        shown += stream.push(token)
        seen.append(token)
        if stream.stop is not None or "�" in (whole := tokenizer.decode(seen)):
            return
        held = whole[len(shown) :]
        assert stop.startswith(held)
        assert held or not any(whole.endswith(stop[:count]) for count in range(1, len(stop)))


def test_a_stop_string_may_spell_special_tokens() -> None:
    tokenizer = tokenizer_of("byte-level")
    end = tokenizer.id_of("<|im_end|>")
    assert end is not None
    ids = [*tokenizer.encode("the cat"), end, *tokenizer.encode("\nsat")]
    assert text_of(tokenizer, (), ids) == "the cat\nsat"
    assert text_of(tokenizer, (), ids, ["<|im_end|>"]) == "the cat"
    assert text_of(tokenizer, (), ids, ["<|im_end|>\n"]) == "the cat"
    assert text_of(tokenizer, (), ids, ["<|im_end|>x"]) == "the cat\nsat"
    assert text_of(tokenizer, (), ids, ["cat<|im"]) == "the "


def test_after_a_stop_nothing_follows() -> None:
    tokenizer = tokenizer_of("byte-level")
    stream = TextStream(tokenizer, (), ["cat"])
    assert "".join(map(stream.push, tokenizer.encode(TEXTS[0]))) == "the "
    assert (stream.flush(), stream.stop) == ("", "cat")
    with pytest.raises(UsageError, match="empty"):
        TextStream(tokenizer, (), ["a", ""])


def test_the_first_tokens_may_hold_a_stop_string() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("the cat sat on the cat")
    free = len(tokenizer.encode("the cat"))
    stream = TextStream(tokenizer, (), ["cat"], free_tokens=free)
    assert "".join(map(stream.push, ids)) == "the cat sat on the "
