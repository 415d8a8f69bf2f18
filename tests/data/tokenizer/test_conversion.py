"""Tokenizers that only transformers' converters read, and what is missing where they cannot."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightlm.data.tokenizer import Tokenizer, conversion
from lightlm.errors import DataError
from tests.data.tokenizer.test_folder import HARD, TRAINED, write_two_files

PIECES = ["The cat sat on the mat, and the dog didn't: naïve café, 3.14!", *(f"one two three {n}" for n in range(200))]


def test_another_way_to_split_text(tmp_path: Path) -> None:
    """vocab.json and merges.txt of a class that splits text otherwise than GPT-2."""
    transformers = pytest.importorskip("transformers")
    folder = write_two_files(tmp_path)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.read(folder)
    for text in (*HARD, "in 2026: 12345"):
        if "<|" not in text:  # which transformers reads as special tokens
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert ours.encode("12") == [*ours.encode("1"), *ours.encode("2")]  # digits by themselves
    assert ours.end_of_text == "<|endoftext|>"
    assert ours.vocab_size >= TRAINED.vocab_size


def test_sentencepiece(tmp_path: Path) -> None:
    transformers, sentencepiece = pytest.importorskip("transformers"), pytest.importorskip("sentencepiece")
    (tmp_path / "pieces.txt").write_text("\n".join(PIECES), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "pieces.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        ours = Tokenizer.read(path)
        for text in ("The cat", "naïve 🙂 3.14", ""):
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.end_of_text == "</s>"


@pytest.mark.parametrize(
    ("name", "content", "missing", "expected"),
    [
        (
            "tokenizer.model",
            b"\n\x0b\n\x05<unk>\x15\xff",
            ("sentencepiece", "google.protobuf"),
            ": pip install sentencepiece protobuf",
        ),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", ("tiktoken",), ": pip install tiktoken"),
        ("spiece.model", b"\n\x0b\xff", ("sentencepiece", "transformers"), '--editable ".[hf]" sentencepiece'),
        ("vocab.txt", b"[PAD]\n[UNK]\n", ("transformers",), '--editable ".[hf]"'),
    ],
)
def test_what_is_not_installed_is_named(
    name: str, content: bytes, missing: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(conversion, "_is_installed", lambda package: package not in missing)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"has no tokenizer\.json\. transformers makes one of {name}, which needs"):
        Tokenizer.read(tmp_path)
    with pytest.raises(DataError) as error:
        Tokenizer.read(tmp_path / name)
    assert str(error.value).endswith(expected)


def test_a_file_that_cannot_be_converted(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(conversion, "_is_installed", lambda package: True)
    (tmp_path / "tokenizer.model").write_bytes(b"\0\xff" * 20)
    with pytest.raises(DataError, match=r"cannot make one of tokenizer\.model: .*Put the model's own tokenizer\.json"):
        Tokenizer.read(tmp_path)
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(DataError, match=r"tokenizer\.model is a Git LFS pointer"):
        Tokenizer.read(tmp_path)
