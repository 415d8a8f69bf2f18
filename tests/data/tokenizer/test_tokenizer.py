"""Tokenizers: losslessness, special tokens as ordinary text, byte counts, loading and its errors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Definition

from lightlm.data import bpe_training
from lightlm.data.sources.hub.client import download_tokenizer
from lightlm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lightlm.data.tokenizer import tokenizer as tokenizer_module
from lightlm.errors import DataError
from tests.corpus import texts

TEXTS = ["The quick brown fox jumps over the lazy dog, again and again and again.\n"] * 3 + [
    "naïve café — “quoted”"
] * 3
TRAINED = train_tokenizer(TEXTS, 320)


@given(text=st.text())
def test_every_text_survives(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@given(text=st.text())
def test_token_bytes_add_up_to_the_text(text: str) -> None:
    assert TRAINED.token_bytes()[TRAINED.encode(text)].sum() == len(text.encode())


def test_the_end_of_text_string_in_a_text_is_ordinary_text() -> None:
    ids = TRAINED.encode("a<|endoftext|>b")
    assert TRAINED.end_of_text_id not in ids
    assert TRAINED.decode(ids) == "a<|endoftext|>b"
    assert TRAINED.decode([*ids, TRAINED.end_of_text_id]) == "a<|endoftext|>b"
    assert TRAINED.token_bytes()[TRAINED.end_of_text_id] == 0


def test_batches_give_what_single_texts_give() -> None:
    texts = ["", "fox", "the lazy <|endoftext|> dog"]
    assert TRAINED.encode_batch(texts) == [TRAINED.encode(text) for text in texts]


@given(text=st.text(alphabet="ab.1' \t\r\n\u00a0é"), size=st.integers(1, 9))
def test_long_texts_give_the_ids_that_they_give_unsplit(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PART_CHARACTERS", size)
        patch.setattr(tokenizer_module, "GROUP_CHARACTERS", 2 * size)
        split = TRAINED.encode_batch([text, "fox", text])
    assert split == [TRAINED.encode(text), TRAINED.encode("fox"), TRAINED.encode(text)]


def test_training_is_deterministic_and_learns_merges() -> None:
    assert train_tokenizer(TEXTS, 320).sha256 == TRAINED.sha256
    assert len(TRAINED.encode(TEXTS[0])) < len(TEXTS[0]) / 2


@pytest.mark.parametrize("limit", [10, 10**9])
def test_ordinary_text_trains_what_the_library_trains(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child process and in this one, the bytes are those of the library's own trainer."""
    monkeypatch.setattr(bpe_training, "HERE_CHARACTERS", limit)
    definition = Definition(models.BPE())
    definition.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    definition.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, min_frequency=2, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    sample = [*texts(200), "深海の魚は。" * 300, "-" * 900 + "a" * 1_000, ""]
    definition.train_from_iterator(sample, trainer)
    assert train_tokenizer(sample, 600).definition == definition.to_str(pretty=True).encode()


def test_a_word_of_megabytes_is_cut_before_training() -> None:
    """Whole, it takes minutes."""
    trained = train_tokenizer(["x" * 500_000, "\n" * 500_000, "one two one two"], 400)
    assert trained.decode(trained.encode("x" * 5_000)) == "x" * 5_000
    assert len(trained.encode("x" * 5_000)) < 50


INTERRUPTED = """
import os, random, signal, sys, threading
from lightlm.data.tokenizer import train_tokenizer
signal.signal(signal.SIGINT, signal.default_int_handler)
letters = "abcdefghijklmnopqrstuvwxyz"
def texts():
    for seed in range(3_000):
        yield "".join(random.Random(seed).choices(letters, k=1_000))
        while seed == ENDLESS:
            yield "a"
        if seed == 0:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    train_tokenizer(texts(), 50_000)  # minutes
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no Ctrl-C there")
@pytest.mark.parametrize("endless", [9, -1])
def test_ctrl_c_ends_training_at_once(endless: int) -> None:
    """While the texts are read, and while the library trains."""
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.replace("ENDLESS", str(endless))], timeout=30, capture_output=True
    )
    assert (result.returncode, result.stderr) == (7, b"")


def test_errors_of_the_texts_and_of_the_child_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> Iterator[str]:
        yield "one " * bpe_training.HERE_CHARACTERS
        raise DataError("unreadable")

    with pytest.raises(DataError, match="unreadable"):
        train_tokenizer(texts(), 300)
    monkeypatch.setattr(bpe_training, "_MODULE", "lightlm.absent")
    with pytest.raises(DataError, match=r"Training the tokenizer failed: .*lightlm\.absent"):
        train_tokenizer(["one " * bpe_training.HERE_CHARACTERS], 300)


def test_a_sample_too_small_for_the_vocabulary_stops_short() -> None:
    assert 257 < train_tokenizer(["one two one two"], 5_000).vocab_size < 5_000


def test_saving_keeps_the_bytes_and_the_hash(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(str(tmp_path), download_tokenizer)
    assert loaded.sha256 == TRAINED.sha256
    assert loaded.vocab_size == TRAINED.vocab_size
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_truncation_stored_in_a_definition_does_not_cut_texts(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    definition = Definition.from_file(str(tmp_path / "tokenizer.json"))
    definition.enable_truncation(3)
    definition.enable_padding(length=50)
    definition.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path), download_tokenizer).encode(TEXTS[0]) == TRAINED.encode(TEXTS[0])


def sentencepiece_like(*added: str) -> bytes:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "é": 259, "<unk>": 260}
    model = models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>")
    definition = Definition(model)
    definition.normalizer = normalizers.Replace(" ", "▁")
    definition.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    definition.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", *added)])
    return definition.to_str().encode()


def test_sentencepiece_vocabularies_count_their_bytes() -> None:
    tokenizer = Tokenizer(sentencepiece_like("</s>"), origin="test")
    assert tokenizer.end_of_text_id == 261
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32
    assert lengths.shape == (262,)
    for text in [" a aé", "日本 a"]:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[[260, 261]].tolist() == [0, 0]


def test_a_tokenizer_without_an_end_of_text_token_names_what_was_looked_for() -> None:
    with pytest.raises(DataError, match=r"<\|endoftext\|>.*</s>"):
        Tokenizer(sentencepiece_like(), origin="test")
    assert Tokenizer(sentencepiece_like(), origin="test", end_of_text_id=260).end_of_text_id == 260
    with pytest.raises(DataError, match="outside"):
        Tokenizer(sentencepiece_like(), origin="test", end_of_text_id=999)


def redefined(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    """The same tokenizer in another form of tokenizer.json."""
    definition = json.dumps(tokenizer.content | changes, indent=7, ensure_ascii=True).encode()
    return Tokenizer(definition, origin="redefined")


def test_a_tokenizer_equals_itself_in_every_form() -> None:
    merges = TRAINED.content["model"]["merges"]
    joined = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    pairs = [merge.split(" ") for merge in joined]
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    begin = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    for form in ({"model": TRAINED.content["model"] | {"merges": each}} for each in (joined, pairs)):
        assert TRAINED.difference(redefined(TRAINED, **form)) == ""
    assert TRAINED.difference(redefined(TRAINED, truncation=truncation, post_processor=begin)) == ""


def test_a_tokenizer_differs_in_what_it_encodes_otherwise() -> None:
    vocabulary, merges = TRAINED.content["model"]["vocab"], TRAINED.content["model"]["merges"]
    names = sorted(vocabulary, key=vocabulary.get)
    swapped = vocabulary | {names[10]: 11, names[11]: 10}
    assert TRAINED.difference(train_tokenizer(TEXTS, 300)) == f"{TRAINED.vocab_size:,} and 300 entries"
    moved = redefined(TRAINED, model=TRAINED.content["model"] | {"vocab": swapped})
    assert TRAINED.difference(moved) == f"entry 10 is {names[10]!r} and {names[11]!r}"
    reordered = redefined(TRAINED, model=TRAINED.content["model"] | {"merges": [merges[1], merges[0], *merges[2:]]})
    assert TRAINED.difference(reordered) == "the merges differ"
    lowered = redefined(TRAINED, normalizer={"type": "Lowercase"})
    assert TRAINED.difference(lowered).startswith("they split ")
