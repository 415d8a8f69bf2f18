"""Contamination: which documents share 13 words in a row with an evaluation set."""

import json
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.chat.conversation import as_text
from lightlm.data.prepare.blocks import ONLY_EXACT, TOO_LARGE
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import texts as sizes
from lightlm.data.select.decontamination import NGRAM_WORDS, Decontaminator
from lightlm.errors import DataError

QUESTION = "Alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron"
PASSAGE = "one two three four five six seven eight nine ten eleven twelve thirteen"


def index() -> Decontaminator:
    return Decontaminator({"greek": [[QUESTION, "yes"], ["too short"]], "numbers": [["x", PASSAGE], [QUESTION]]})


def test_thirteen_words_in_a_row_are_found() -> None:
    found_in = index().found_in
    inside = "He said: " + QUESTION.upper().replace(" ", ", ") + "!"
    assert found_in(inside) == ["greek", "numbers"]
    assert found_in(f"{PASSAGE}.") == ["numbers"]
    assert found_in(f"{inside} and {PASSAGE}") == ["greek", "numbers"]
    assert found_in("beta " + QUESTION.split(maxsplit=3)[3]) == []  # 12 of its words, and another
    assert found_in(PASSAGE.replace("seven", "seven seven")) == []
    assert found_in("") == found_in("too short") == []


def test_a_message_that_is_a_question_is_found() -> None:
    talk = [{"role": "user", "content": PASSAGE}, {"role": "assistant", "content": "yes"}]
    assert index().found_in(as_text(talk)) == ["numbers"]


@pytest.mark.parametrize(
    "passage",
    [
        "深海的鱼在没有光的水里怎样找到食物",
        "うみのそこでくらすさかなはひかりをしらない",
        "ปลาที่อยู่ในทะเลลึกหาอาหารได้อย่างไรในที่มืด",
    ],
)
def test_text_without_spaces_is_searched(passage: str) -> None:
    made = Decontaminator({"sea": [[passage]]})
    assert made.coverage["sea"]["too_short"] == 0
    assert made.found_in(f"前文 {passage[:5]}, {passage}。后文") == ["sea"]
    assert made.found_in(passage[:12]) == []


def test_words_of_two_texts_are_no_run() -> None:
    half, rest = PASSAGE.split(" seven ")
    assert Decontaminator({"numbers": [[half, rest], [f"{half} seven"]]}).found_in(PASSAGE) == []


def test_what_could_not_be_checked_is_counted() -> None:
    made = index()
    assert made.names == ["greek", "numbers"]
    assert made.coverage["greek"] == {"examples": 2, "too_short": 1}
    assert made.coverage["numbers"] == {"examples": 2, "too_short": 0}


def test_the_fingerprint_follows_names_and_texts() -> None:
    one = Decontaminator({"a": [[QUESTION]], "b": [[PASSAGE]]}).fingerprint
    assert one == Decontaminator({"a": [["", QUESTION]], "b": [[PASSAGE]]}).fingerprint
    others = [
        Decontaminator({"a": [[QUESTION]], "c": [[PASSAGE]]}),
        Decontaminator({"b": [[QUESTION]], "a": [[PASSAGE]]}),
        Decontaminator({"a": [[QUESTION + " pi"]], "b": [[PASSAGE]]}),
        Decontaminator({"a": [[QUESTION]], "b": []}),
    ]
    assert one not in {other.fingerprint for other in others}


def test_an_empty_set_finds_nothing() -> None:
    made = Decontaminator({"none": [], "short": [["a b c"]]})
    assert made.found_in(PASSAGE) == []
    assert made.coverage == {"none": {"examples": 0, "too_short": 0}, "short": {"examples": 1, "too_short": 1}}


def test_it_travels_to_a_worker_without_its_table() -> None:
    made = index()
    before = len(pickle.dumps(made))
    made.found_in(PASSAGE)
    assert len(pickle.dumps(made)) == before < 5_000
    assert pickle.loads(pickle.dumps(made)).found_in(PASSAGE) == ["numbers"]


@given(seed=st.integers(0, 10_000))
def test_it_finds_what_a_set_of_tuples_finds(seed: int) -> None:
    """Few different words, so that runs come and go by chance."""
    rng = random.Random(seed)

    def words(count: int) -> list[str]:
        cycle = ["a", "b", "c", "d"] * count
        start = rng.randrange(4)
        return [w if rng.random() > 0.05 else "e" for w in cycle[start : start + count]]

    def grams(text: list[str]) -> set[tuple[str, ...]]:
        return {tuple(text[i : i + NGRAM_WORDS]) for i in range(len(text) - NGRAM_WORDS + 1)}

    sets = {name: [words(rng.randint(5, 30)) for _ in range(3)] for name in ("x", "y")}
    made = Decontaminator({name: [[" ".join(text)] for text in texts] for name, texts in sets.items()})
    for _ in range(5):
        document = words(rng.randint(5, 60))
        expected = [name for name, texts in sets.items() if any(grams(document) & grams(text) for text in texts)]
        assert made.found_in(" ".join(document)) == expected


def test_documents_too_large_to_be_searched_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "LARGE_BYTES", 1_000)
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 600)
    source = tmp_path / "in.jsonl"
    documents = ["One.", f"{PASSAGE} " * 50, "Two.", "three " * 500]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    sets = Decontaminator({"numbers": [[PASSAGE]]})
    made = prepare(str(source), "train:300", tmp_path / "out", decontaminate=sets)
    assert made.flagged == {TOO_LARGE: 2}
    assert made.dropped == {}
    assert made.listed == [f"in.jsonl#byte=0, document {n}: {TOO_LARGE}" for n in (1, 3)]
    made = prepare(str(source), "train:300", tmp_path / "near", dedup="near")
    assert made.flagged == {ONLY_EXACT: 2}
    assert prepare(str(source), "train:300", tmp_path / "plain").flagged == {}


def test_contaminated_documents_are_left_out_or_listed(tmp_path: Path) -> None:
    documents = [f"Document {n} is about something else." for n in range(20)]
    documents[3], documents[7] = f"Look: {PASSAGE}!", f"{QUESTION} and {PASSAGE}"
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    sets = {"greek": [[QUESTION]], "numbers": [[PASSAGE], ["too short"]]}
    causes = {"contaminated: greek, numbers": 1, "contaminated: numbers": 1}
    listed = [f"in.jsonl#byte=0, document {n}: contaminated: {s}" for n, s in ((3, "numbers"), (7, "greek, numbers"))]
    for drops in (True, False):
        made = prepare(
            str(source), "train:300", tmp_path / f"out{drops}", decontaminate=Decontaminator(sets, drops=drops)
        )
        assert made.documents("train") + made.documents("val") == (18 if drops else 20)
        assert (made.dropped, made.flagged) == ((causes, {}) if drops else ({}, causes))
        assert made.listed == listed
        assert made.evaluation_sets["numbers"] == {"examples": 2, "too_short": 1}
    with pytest.raises(DataError, match=r"decontaminate: greek,numbers \(.*\), dropped there, None now"):
        prepare(str(source), "train:300", tmp_path / "outTrue")
