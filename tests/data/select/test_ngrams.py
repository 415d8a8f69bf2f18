"""n-gram hashes: which words count as the same, and that chunks of a text join without a seam."""

import re
import string
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.select import ngrams
from lightlm.data.select.ngrams import ngram_hashes, word_hashes


def hashes(text: str, size: int = 1) -> list[int]:
    arrays = word_hashes(text) if size == 1 else ngram_hashes(text, size)
    return [value for hashes in arrays for value in hashes.tolist()]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The quick, brown FOX!", "the quick brown fox"),
        ("  a\n\nb\tc ", "a b c"),
        ("“Don’t—stop”", '"Don\'t--stop"'),
        ("ÉTÉ à Köln", "été À kÖLN"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("$5 + 3%", "5 3"),
        ("a\u00a0b", "a b"),
        ("…", ""),
    ],
)
def test_the_same_words(one: str, other: str) -> None:
    assert hashes(one) == hashes(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ab c", "a bc"),
        ("ab", "ba"),
        ("a b", "b a"),
        ("été", "ete"),
        ("語", "本"),
        ("😀", "😁"),
        ("0", "00"),
        ("a", "aa"),
    ],
)
def test_other_words(one: str, other: str) -> None:
    assert hashes(one) != hashes(other)


def reference(text: str) -> list[str]:
    """GPT-3's words, for ASCII."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


@given(text=st.text(alphabet="aAbc.,' \n\t-", max_size=80), size=st.integers(2, 5))
def test_hashes_are_equal_where_the_words_are(text: str, size: int) -> None:
    words = reference(text)
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    assert len(hashes(text)) == len(words)
    assert len(set(hashes(text))) == len(set(words))
    assert len(hashes(text, size)) == len(grams)
    assert len(set(hashes(text, size))) == len(set(grams))
    assert [a == b for a, b in pairwise(hashes(text, size))] == [a == b for a, b in pairwise(grams)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("今日は、世界。", "今 日 は 世 界"),
        ("カタカナ ﾊﾝｶｸ ㄅㄆ", "カ タ カ ナ ﾊ ﾝ ｶ ｸ ㄅ ㄆ"),
        ("GPT-2是2019年的model!", "gpt2 是 2019 年 的 model"),
        ("𠀀𠀁a𠀂 b𠀀", "𠀀 𠀁 a 𠀂 b 𠀀"),  # Han beyond the basic plane
        ("สวัสดี2020ปี", "ส วั ส ดี 2020 ปี"),  # marks belong to the letters before them
        ("ລາວ ខ្មែរ မြန်မာ", "ລ າ ວ ខ្ មែ រ မြ န် မာ"),
        ("한국어 문장 русский हिन्दी 😀a", "한국어 문장 русский हिन्दी 😀a"),  # written with spaces
    ],
)
def test_scripts_without_spaces_have_a_word_per_character(text: str, words: str) -> None:
    assert hashes(text) == [value for word in words.split() for value in hashes(word)]
    assert len(hashes(text)) == len(words.split())


def naive_words(text: str) -> list[str]:
    """Words of a text of Latin and Han letters, spaces and commas."""
    return re.findall(r"[a-z]+|[\u4e00-\u9fff]|[\U00020000-\U0002ffff]", text.lower().replace(",", ""))


@given(text=st.text(alphabet="aB ,中文\U00020000\U00020001", max_size=60))
def test_mixed_text_is_split_as_a_pattern_splits_it(text: str) -> None:
    assert hashes(text) == [value for word in naive_words(text) for value in hashes(word)]


@pytest.mark.parametrize("chunk", [7, 64])
def test_no_seams_between_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"w{n % 17} Ünï" for n in range(60))
    whole = hashes(text, 5)
    monkeypatch.setattr(ngrams, "CHUNK_CHARACTERS", chunk)
    ngrams._powers.cache_clear()
    try:
        assert hashes(text, 5) == whole
    finally:
        ngrams._powers.cache_clear()


def test_a_word_longer_than_a_chunk_is_read_to_its_end() -> None:
    start, end = "x" * ngrams.CHUNK_CHARACTERS + "y", "x" * ngrams.CHUNK_CHARACTERS + "z"
    assert hashes(start) != hashes(end)
    assert len(hashes("𝔘" * (ngrams.CHUNK_CHARACTERS + 5) + " end")) == 3


def test_hashes_do_not_change_between_versions() -> None:
    """Signatures on disk outlive a process: they are compared with those of a resumed run."""
    assert hashes("Hello, world") == [2163324483675975834, 12200089241319927280]
    assert hashes("Hello, world", 2) == [677642896942572624]
    assert all(hashes.dtype == np.uint64 for hashes in ngram_hashes("a b c", 2))
