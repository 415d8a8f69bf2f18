"""How much of a text a tokenizer cannot represent.

A byte-level tokenizer, or one that falls back on bytes, represents every text. Others have an unknown token, or leave
out a character that they do not know: bytes per token and bits per byte then look good because text is missing.
"""

import sys
from collections.abc import Mapping

import numpy as np
import pyarrow

from lightlm.data.readers.texts import buffers_of
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.definition import BYTE_TOKENS, is_word_based

MOST_LOST = 0.01  # share of the characters, or of the tokens, above which a text is refused
_NEW, _KNOWN, _LOST, _BLANK = range(4)


def may_lose_text(tokenizer: Tokenizer) -> bool:
    """Return whether some text has no tokens, or unknown ones: not if there is a token for each byte."""
    from tokenizers import pre_tokenizers

    names = tokenizer.entries.keys()
    if tokenizer.byte_level and not is_word_based(tokenizer.content):
        return not set(pre_tokenizers.ByteLevel.alphabet()) <= names
    falls_back = (tokenizer.content.get("model") or {}).get("byte_fallback") is True
    return not (falls_back and names >= BYTE_TOKENS.keys())


class LossCounter:
    """Counts the characters and tokens of texts, and those that stand for text that is lost.

    Each character is tokenized by itself once, so counting costs milliseconds per megabyte. That is exact for BPE, and
    for Unigram as SentencePiece trains it; of word-based models (WordPiece, WordLevel) only unknown tokens are counted.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._states = np.zeros(sys.maxunicode + 1, np.uint8)  # threads may fill it at once, with equal values

    def count(self, texts: pyarrow.Array, ids: np.ndarray) -> dict[str, int]:
        """Count `characters` (not blank) and `lost_characters` of the texts, `tokens` and `unknown_tokens` of ids."""
        counts = {"tokens": len(ids), "unknown_tokens": 0, "characters": 0, "lost_characters": 0}
        if (unknown := self._tokenizer.unknown_id) is not None:
            counts["unknown_tokens"] = int(np.count_nonzero(ids == unknown))
        if not is_word_based(self._tokenizer.content) and len(texts):
            offsets, data = buffers_of(texts)
            text = data[offsets[0] : offsets[-1]].tobytes().decode()
            found = np.bincount(np.frombuffer(text.encode("utf-32-le"), "<u4"))
            codes = np.flatnonzero(found)
            for code in codes[self._states[codes] == _NEW].tolist():
                self._states[code] = self._state(chr(code))
            states = self._states[codes]
            counts["characters"] = int(found[codes[states != _BLANK]].sum())
            counts["lost_characters"] = int(found[codes[states == _LOST]].sum())
        return counts

    def _state(self, character: str) -> int:
        if character.isspace():
            return _BLANK
        return _KNOWN if self._tokenizer.represents(character) else _LOST


def loss_shares(lost: Mapping[str, int]) -> dict[str, float]:
    """Return the shares of characters and tokens that are lost, worded for people; only those above 0."""
    shares = {
        "characters without a token": lost.get("lost_characters", 0) / max(1, lost.get("characters", 0)),
        "tokens that are the unknown token": lost.get("unknown_tokens", 0) / max(1, lost.get("tokens", 0)),
    }
    return {name: share for name, share in shares.items() if share}


def describe_loss(lost: Mapping[str, int]) -> str:
    """Return the shares in words; empty if nothing is lost."""
    return ", ".join(f"{share:.2%} {name}" for name, share in loss_shares(lost).items())
