import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import NewToken
from lightlm.serve.text import ChoiceText, Piece
from tests.evaluate.tiny_run import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def pieces_of(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...], end: str = "length") -> list[Piece]:
    text, pieces = ChoiceText(tokenizer, [], stops), []
    for i, token in enumerate(ids):
        last = end if i == len(ids) - 1 else None
        piece = text.take(NewToken(0, token, last))
        if piece is not None:
            pieces.append(piece)
            if piece.finish_reason:
                break
    return pieces


STOPS = st.lists(st.sampled_from(["cat", "at", "the", " s", "\n", "e d", "o", "ran after the cat", "Ω"]), max_size=3)


@settings(deadline=None)
@given(ids=st.lists(st.integers(1, 300), min_size=1, max_size=40), stops=STOPS, data=st.data())
def test_parts_join_to_the_decoded_text_before_the_first_stop_text(ids, stops, data) -> None:
    tokenizer = tiny_tokenizer_once()
    if data.draw(st.booleans()):
        ids = tokenizer.encode("The cat sat on the mat, naïve and déjà vu. Ω" * 2)[: len(ids)] + ids
    pieces = pieces_of(tokenizer, ids, tuple(stops))
    full = tokenizer.decode(ids)
    cuts = [full.find(stop) for stop in stops if stop in full]
    expected = full[: min(cuts)] if cuts else full
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish_reason == ("stop" if cuts else "length")
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.token.id for token in tokens] == ids[: len(tokens)]
    assert cuts or len(tokens) == len(ids)
    # Each token is told with the part in which its text begins.
    start = 0
    for piece in pieces:
        end = start + len(piece.text)
        assert all(start <= token.offset < end + (piece is pieces[-1]) for token in piece.tokens)
        start = end


_ONCE: list[Tokenizer] = []


def tiny_tokenizer_once() -> Tokenizer:
    if not _ONCE:
        _ONCE.append(tiny_tokenizer())
    return _ONCE[0]


def test_a_stop_token_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("The cat"), tokenizer.end_of_text_id]
    pieces = pieces_of(tokenizer, ids, (), end="stop")
    assert "".join(piece.text for piece in pieces) == "The cat"
    assert (pieces[-1].finish_reason, pieces[-1].taken) == ("stop", len(ids) - 1)


def test_text_that_may_begin_a_stop_text_waits(tokenizer: Tokenizer) -> None:
    text = ChoiceText(tokenizer, [], ("cats",))
    made = [text.take(NewToken(0, token)) for token in tokenizer.encode("a cat")]
    assert "".join(piece.text for piece in made if piece) == "a "
    assert text.take(NewToken(0, tokenizer.encode(" ")[0])).text == "cat "


def test_a_token_that_waits_is_told_with_its_text(tokenizer: Tokenizer) -> None:
    text = ChoiceText(tokenizer, [], ("cats",))
    [token] = tokenizer.encode("c")
    assert text.take(NewToken(0, token)) is None
    piece = text.take(NewToken(0, token))  # the first can be no stop text anymore, the second can
    assert (piece.text, [each.offset for each in piece.tokens]) == ("c", [0])
