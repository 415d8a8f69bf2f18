"""Tokenizers of every kind that models have, each trained on a few sentences."""

import functools
import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lightlm.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat, naïve déjà vu 日本語 🙂🙃 " * 3, "don't — 'stop' it", "one two three. one two three."]
SPECIAL = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]


def _metaspace() -> tokenizers.Tokenizer:
    """As sentencepiece makes them: a space before each text, and bytes for unknown characters."""
    raw = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *byte_names], limit_alphabet=40)
    raw.train_from_iterator([text[:40] for text in TEXTS] + TEXTS[1:], trainer)
    values = json.loads(raw.to_str())
    values["added_tokens"] = [entry for entry in values["added_tokens"] if entry["content"] in SPECIAL]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def _wordpiece() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", *SPECIAL]))
    return raw


def _byte_level() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer.from_str(train_tokenizer(TEXTS, 400).definition.decode())
    raw.add_special_tokens(SPECIAL)
    return raw


_KINDS = {"byte-level": _byte_level, "metaspace": _metaspace, "wordpiece": _wordpiece}
KINDS = tuple(_KINDS)


@functools.cache
def tokenizer_of(kind: str, begins_with: str | None = None) -> Tokenizer:
    """A tokenizer of one of `KINDS`; its post-processor puts `begins_with` before each text, as Llama's does."""
    values = json.loads(_KINDS[kind]().to_str())
    if begins_with is not None:
        values["post_processor"] = framing(begins_with, values)
    tokenizer = Tokenizer(json.dumps(values).encode(), origin=kind)
    begin = tokenizer.id_of(begins_with)
    return tokenizer.used_as(begin, begin is not None, {}, {})


def framing(token: str, values: dict[str, Any]) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts a token before each text."""
    index = next(entry["id"] for entry in values["added_tokens"] if entry["content"] == token)
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
