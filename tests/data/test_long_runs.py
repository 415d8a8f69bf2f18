"""Long runs of one kind of character: what stays whole, and what a tokenizer is trained on."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data import long_runs
from lightlm.data.long_runs import LONGEST, SAMPLED, cut_long_runs


def kind(character: str) -> str:
    if character.isspace():
        return "space"
    return "letter" if character.isalpha() else "digit" if re.fullmatch(r"\d", character) else "other"


@given(
    runs=st.lists(st.tuples(st.sampled_from("ab 1-\né語"), st.integers(1, 40)), max_size=12),
    longest=st.sampled_from([2, 7, 10]),
)
def test_exactly_the_long_runs_are_cut(runs: list[tuple[str, int]], longest: int) -> None:
    text = "".join(letter * count for letter, count in runs)
    pieces = ["".join(group) for _, group in itertools.groupby(text, kind)]
    expected: list[str] = []
    whole = ""
    for piece in pieces:
        if len(piece) <= longest:
            whole += piece
            continue
        expected += [whole] * bool(whole) + [piece[i : i + longest] for i in range(0, len(piece), longest)]
        whole = ""
    expected += [whole] * bool(whole or not text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_runs, "LONGEST", longest)
        patch.setattr(long_runs, "_STEP", longest // 2)
        assert list(cut_long_runs([text])) == expected


def test_ordinary_texts_are_yielded_as_they_are() -> None:
    texts = ["", "word " * 5_000, "文字。" * 3_000, "-" * LONGEST + "a" * LONGEST]
    assert list(cut_long_runs(texts)) == texts
    assert all(one is other for one, other in zip(cut_long_runs(texts), texts, strict=True))


def test_only_a_sample_of_long_runs_is_yielded() -> None:
    pieces = list(cut_long_runs(["x " + "a" * (SAMPLED - 500) + " y", "b" * 3_000_000, "z " + "c" * 5_000 + " end"]))
    assert max(map(len, pieces)) == LONGEST
    assert sum(piece.count("a") + piece.count("b") for piece in pieces) == SAMPLED
    assert pieces[-2:] == ["z ", " end"]
    assert " y" in pieces
