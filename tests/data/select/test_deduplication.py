"""Deduplication: the first stays, whatever the batches; near-duplicates against their exact similarity."""

import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.select import hash_index
from lightlm.data.select.deduplication import (
    BANDS,
    EXACT_DUPLICATE,
    KEPT,
    NEAR_DUPLICATE,
    ROWS,
    Deduplicator,
    Signer,
)
from lightlm.data.select.hash_index import HashIndex

WORDS = [f"word{n}" for n in range(5_000)]


def prose(seed: int, words: int = 400) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def verdicts(texts: list[str], mode: str = "near", batch: int = 1_000) -> list[int]:
    signer, deduplicator = Signer(mode), Deduplicator(mode)
    signed = [signer.sign(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    return np.concatenate([deduplicator.decide(part) for part in signed]).tolist()


def similarity(one: list[str], other: list[str]) -> float:
    """The exact Jaccard similarity of the 5-grams."""
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one, other))
    return len(a & b) / len(a | b)


def changed(words: list[str], edits: int, seed: int) -> list[str]:
    copy, rng = list(words), random.Random(seed)
    for place in rng.sample(range(len(copy)), edits):
        copy[place] = f"other{rng.random()}"
    return copy


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_the_first_of_a_kind_stays(batch: int) -> None:
    one, two = " ".join(prose(1)), " ".join(prose(2))
    near = one.replace(" ", ", ", 30).upper()  # the same words
    short, blank = "Hello world", "?!"
    texts = [one, two, one, near, near, short, "hello, world!", "hello", blank, blank, "..."]
    assert verdicts(texts, "exact", batch) == [0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0]
    expected = [KEPT, KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE, NEAR_DUPLICATE, KEPT, NEAR_DUPLICATE, KEPT]
    assert verdicts(texts, "near", batch) == [*expected, KEPT, EXACT_DUPLICATE, KEPT]


def test_a_document_is_compared_with_those_that_stay() -> None:
    """A chain: each resembles its neighbor, the ends do not resemble each other, so the far end stays."""
    base = prose(3)
    far = base[:150] + prose(4, 250)
    middle = base[:390] + prose(5, 10)
    assert similarity(base, middle) > 0.9 > 0.4 > similarity(base, far)
    assert verdicts([" ".join(base), " ".join(middle), " ".join(far)]) == [KEPT, NEAR_DUPLICATE, KEPT]


def test_near_duplicates_are_found_as_often_as_the_bands_promise() -> None:
    found: dict[str, list[bool]] = {"above 0.9": [], "0.4 to 0.5": [], "unrelated": []}
    promised = {name: [] for name in found}
    for seed in range(150):
        original = prose(seed)
        for name, edits in (("above 0.9", 3), ("0.4 to 0.5", 40), ("unrelated", 400)):
            other = changed(original, edits, seed)
            signed = Signer("near").sign([" ".join(original), " ".join(other)])
            found[name].append(bool((signed[0, 1:] == signed[1, 1:]).any()))
            promised[name].append(1 - (1 - similarity(original, other) ** ROWS) ** BANDS)
    assert all(found["above 0.9"])
    assert not any(found["unrelated"])
    assert np.mean(found["0.4 to 0.5"]) == pytest.approx(np.mean(promised["0.4 to 0.5"]), abs=0.06)


@pytest.mark.parametrize("first", ["一", "あ", "ก"])
def test_near_duplicates_without_spaces_are_found(first: str) -> None:
    rng = random.Random(1)
    letters = [chr(ord(first) + n) for n in range(2_500 if first == "一" else 40)]
    originals = ["".join(rng.choices(letters, k=300)) for _ in range(50)]
    copies = [text[:150] + ("二" if text[150] == "三" else "三") + text[151:] for text in originals]
    assert all(similarity(list(one), list(other)) > 0.9 for one, other in zip(originals, copies, strict=True))
    assert verdicts(originals + copies) == [KEPT] * 50 + [NEAR_DUPLICATE] * 50


def signatures_strategy() -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 6), min_size=BANDS + 1, max_size=BANDS + 1)
    return st.lists(row, max_size=30)


@given(rows=signatures_strategy(), cuts=st.lists(st.integers(0, 30), max_size=4), recent=st.sampled_from([1, 4, 100]))
def test_verdicts_are_those_of_the_rule_whatever_the_batches(
    rows: list[list[int]], cuts: list[int], recent: int
) -> None:
    expected: list[int] = []
    kept: list[list[int]] = []
    for row in rows:
        if any(row[0] == other[0] for other in kept):
            expected.append(EXACT_DUPLICATE)
        elif any(a == b for other in kept for a, b in zip(row[1:], other[1:], strict=True)):
            expected.append(NEAR_DUPLICATE)
        else:
            expected.append(KEPT)
            kept.append(row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_index, "RECENT", recent)
        # The values stand in the upper bits, where hashes differ too.
        table = np.array(rows, np.uint64).reshape(-1, BANDS + 1) << np.uint64(59)
        deduplicator = Deduplicator("near")
        parts = np.split(table, sorted(cut for cut in cuts if cut <= len(rows)))
        assert [int(v) for part in parts for v in deduplicator.decide(part)] == expected


def test_an_index_contains_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_index, "RECENT", 500)
    rng = np.random.default_rng(1)
    edges = np.array([0, 1 << 16, (1 << 48) - (1 << 16), 1 << 48, 2**64 - (1 << 16)], np.uint64)
    known = np.concatenate([edges, rng.integers(0, 2**64, 20_000, np.uint64)])
    others = np.concatenate([edges + np.uint64(1 << 16), rng.integers(0, 2**64, 20_000, np.uint64)])
    others = np.setdiff1d(others, known)
    index = HashIndex()
    for part in np.array_split(known, 37):
        assert not index.contains(part).any()
        index.add(part)
        assert index.contains(part).all()
    assert index.contains(known).all()
    assert not index.contains(others).any()
    assert len(index) == len(known)


def test_a_signer_travels_and_says_what_its_signatures_depend_on() -> None:
    signer = pickle.loads(pickle.dumps(Signer("near")))
    assert signer.sign([]).shape == (0, signer.columns)
    assert signer.sign(["a", "b"]).shape == (2, 15)
    assert "R-MinHash" in signer.method
    assert Signer("exact").method == "xxh3_64"
    with pytest.raises(ValueError, match="15 hashes; expected 1"):
        Deduplicator("exact").decide(signer.sign(["a"]))
