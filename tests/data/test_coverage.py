"""Text that a tokenizer loses: counted exactly, and refused above a small share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Definition
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lightlm.data.coverage import LossCounter, describe_loss, may_lose_text
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import texts as sizes
from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.errors import DataError
from tests.data.tokenizer.test_tokenizer import sentencepiece_like

LETTERS = "abcdefghijklmnopqrstuvwxyz. "


def made(model: Any, pre_tokenizer: Any = None, normalizer: Any = None, decoder: Any = None) -> Tokenizer:
    definition = Definition(model)
    definition.add_special_tokens(["</s>"])
    for part, value in (("pre_tokenizer", pre_tokenizer), ("normalizer", normalizer), ("decoder", decoder)):
        if value is not None:
            setattr(definition, part, value)
    return Tokenizer(definition.to_str().encode(), origin="test")


def letters(*more: str) -> dict[str, int]:
    return {token: index for index, token in enumerate([*more, *LETTERS, "▁"])}


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = {letter: index for index, letter in enumerate(ALPHABET)}
LOSING = {
    "vanishing": made(models.BPE(letters(), []), pre_tokenizers.Whitespace()),
    "unknown": made(models.BPE(letters("<unk>"), [], unk_token="<unk>", fuse_unk=True)),
    "metaspace": made(
        models.Unigram([("<unk>", 0.0)] + [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz.▁"], 0),
        pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(),
    ),
    "lower case": made(models.BPE(letters(), []), normalizer=normalizers.Lowercase()),
    "half the bytes": made(
        models.BPE({letter: index for letter, index in BYTES.items() if index % 256 < 128 or letter in LETTERS}, []),
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel(),
    ),
}  # fmt: skip


def count(tokenizer: Tokenizer, *texts: str) -> dict[str, int]:
    ids = np.array([index for text in texts for index in tokenizer.encode(text)], np.uint32)
    return LossCounter(tokenizer).count(pyarrow.array(["left out", *texts], pyarrow.large_string())[1:], ids)


@given(text=st.text(alphabet="abzxя深é. \n"))
@pytest.mark.parametrize("name", ["vanishing", "unknown", "metaspace"])
def test_characters_outside_the_vocabulary_are_counted(name: str, text: str) -> None:
    found = count(LOSING[name], text, "one text")
    assert found["lost_characters"] == sum(text.count(letter) for letter in "я深é")
    assert found["characters"] == len("".join(text.split())) + len("onetext")


def test_what_is_known_in_another_form_is_not_lost() -> None:
    assert count(LOSING["lower case"], "ABC Я")["lost_characters"] == 1
    assert (
        count(made(models.BPE(letters(), []), normalizer=normalizers.Replace("*", "")), "a*b")["lost_characters"] == 0
    )


def test_half_a_character_is_lost() -> None:
    lost = count(LOSING["half the bytes"], "abc日")
    assert (lost["characters"], lost["lost_characters"]) == (4, 1)


def test_unknown_tokens_are_counted() -> None:
    words = made(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"), pre_tokenizers.Whitespace())
    assert count(words, "one two three", "one") == {
        "tokens": 4, "unknown_tokens": 1, "characters": 0, "lost_characters": 0
    }  # fmt: skip
    assert count(LOSING["unknown"], "aяяb")["unknown_tokens"] == 1
    assert describe_loss(count(words, "one two three", "one")) == "25.00% tokens that are the unknown token"


def test_tokenizers_with_a_token_per_byte_lose_nothing() -> None:
    assert not may_lose_text(train_tokenizer(["one two"], 300))
    assert not may_lose_text(Tokenizer(sentencepiece_like("</s>"), origin="test"))
    assert all(may_lose_text(tokenizer) for tokenizer in LOSING.values())


def write(path: Path, text: str, documents: int = 20) -> str:
    path.write_text("".join(json.dumps({"text": f"{text} {text}"}) + "\n" for _ in range(documents)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("large", [100, 8 << 20])
@pytest.mark.parametrize("dedup", [None, "exact"])
def test_a_text_is_refused_or_its_loss_is_counted(
    large: int, dedup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "LARGE_BYTES", large)
    LOSING["unknown"].save(tmp_path / "tokenizer.json")
    tokenizer = str(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"does not know this text: 9\.1% characters without a token"):
        prepare(write(tmp_path / "bad.jsonl", "it was a longя"), tokenizer, tmp_path / "out", dedup=dedup)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()
    few = write(tmp_path / "few.jsonl", "it was a long day and a long night " * 20 + "я")
    lost = prepare(few, tokenizer, tmp_path / "out", dedup=dedup).lost
    assert lost["lost_characters"] / lost["characters"] == pytest.approx(1 / 521)
    fine = write(tmp_path / "fine.jsonl", "it was a long day")
    assert prepare(fine, "train:300", tmp_path / "fine", dedup=dedup).lost == {}


def test_a_tokenizer_that_cannot_encode_a_text_says_so() -> None:
    words = made(models.WordLevel({"one": 0}, unk_token="[UNK]"), pre_tokenizers.Whitespace())
    with pytest.raises(DataError, match=r"cannot encode 'one other'"):
        words.encode("one other")
