"""Hashes of the n-grams of a text's words, in numpy; near-duplicates and contamination are found by them.

Words are defined as in GPT-3's appendix C (arXiv 2005.14165): lower case, punctuation removed, split at white space.
Punctuation is Unicode's categories P and S, so curly and straight quotes are alike. Characters beyond the basic plane
count as letters. Scripts that are written without spaces have no such words: each of their characters is a word.
"""

import functools
import unicodedata
from collections.abc import Iterator

import numpy as np

from lightlm.data.hashing import mix

# Characters per chunk: powers and intermediate arrays fit in the processor's cache, and a document needs memory only
# for the hashes of its words.
CHUNK_CHARACTERS = 1 << 16

_CHARACTER_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_WORD_BASE = 0xD6E8FEB86659FD93
# Classes of UTF-16 code units. `_WORD` begins a word of one character, `_HALF_WORD` one of a surrogate pair, and
# `_MARK`, such as a Thai vowel sign, belongs to the character before it.
_SEPARATOR, _DROPPED, _KEPT, _WORD, _HALF_WORD, _MARK = range(6)

# Blocks of Unicode whose scripts are written without spaces between words: (first, last) code point, inclusive.
_UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x312F),  # radicals, ideographic marks, Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31BF),  # Bopomofo Extended
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0xA4CF),  # Han, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar Extended-B
    (0xAA60, 0xAADF),  # Myanmar Extended-A, Tai Viet
    (0xF900, 0xFAFF),  # Han, compatibility
    (0xFF66, 0xFF9F),  # Katakana of half width
)
_HAN_HIGH_SURROGATES = (0xD840, 0xD8BF)  # Han beyond the basic plane: U+20000 to U+3FFFF


def ngram_hashes(text: str, size: int) -> Iterator[np.ndarray]:
    """Yield arrays with the hashes of all runs of `size` words, uint64, in their order; none for a shorter text.

    The hashes are the same on every machine.
    """
    words = np.zeros(0, np.uint64)
    for more in word_hashes(text):
        words = np.concatenate([words, more])
        if len(words) >= size:
            yield _combine(words, size)
            words = words[len(words) - size + 1 :]


def word_hashes(text: str) -> Iterator[np.ndarray]:
    """Yield arrays with the hash of each word, uint64."""
    for chunk in _chunks(text):
        hashes = _hash_words(chunk.lower())
        if hashes.size:
            yield hashes


def _chunks(text: str) -> Iterator[str]:
    """Split the text into chunks of about `CHUNK_CHARACTERS`, at white space; a longer word is cut anywhere."""
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARACTERS
        if end < len(text):
            end = max((text.rfind(space, start, end) + 1 for space in " \n\t"), default=0) or end
        yield text[start:end]
        start = end


def _hash_words(text: str) -> np.ndarray:
    """Return the hash of each word of a lower-case text of about `CHUNK_CHARACTERS` at most.

    The hash of a word is the polynomial sum(character_i * base**i). It is the sum from its start to the next word, in
    which white space counts as 0, divided by the power at its start.
    """
    ascii_only = text.isascii()  # then a code unit is a byte
    encoded = text.encode("ascii" if ascii_only else "utf-16-le", "surrogatepass")
    codes = np.frombuffer(encoded, np.uint8 if ascii_only else "<u2")
    classes = _classes()[codes]
    if (classes == _DROPPED).any():
        kept = classes != _DROPPED
        codes, classes = codes[kept], classes[kept]
    inside = classes >= _KEPT
    begins = inside & ~_shifted(inside, 1)
    if not ascii_only and (classes > _KEPT).any():
        alone, halves, marks = (classes == kind for kind in (_WORD, _HALF_WORD, _MARK))
        after = _shifted(alone | marks, 1) | _shifted(halves, 2)
        begins |= inside & ~marks & (alone | halves | after)
    starts = np.flatnonzero(begins)
    if starts.size == 0:
        return np.zeros(0, np.uint64)
    powers, inverses = _powers()
    terms = powers[: len(codes)] * (codes * inside)
    return mix(np.add.reduceat(terms, starts) * inverses[starts])


def _shifted(flags: np.ndarray, places: int) -> np.ndarray:
    """Return the flags moved toward the end by some places."""
    return np.concatenate([np.zeros(places, bool), flags])[: len(flags)]


def _combine(words: np.ndarray, size: int) -> np.ndarray:
    hashes = words[: len(words) - size + 1].copy()
    for offset in range(1, size):
        hashes *= np.uint64(_WORD_BASE)
        hashes += words[offset : len(words) - size + 1 + offset]
    return mix(hashes)


@functools.cache
def _classes() -> np.ndarray:
    """Return the class of each UTF-16 code unit: uint8 of shape (65536,)."""
    table = np.full(65536, _KEPT, np.uint8)
    for first, last in _UNSPACED:
        table[first : last + 1] = _WORD
    table[_HAN_HIGH_SURROGATES[0] : _HAN_HIGH_SURROGATES[1] + 1] = _HALF_WORD
    for code in range(65536):
        category = unicodedata.category(chr(code))
        if chr(code).isspace():
            table[code] = _SEPARATOR
        elif table[code] == _WORD and category[0] == "M":
            table[code] = _MARK
        elif 0xFDD0 <= code <= 0xFDEF:  # what marks the messages of a conversation (`data.chat.conversation`)
            table[code] = _SEPARATOR
        elif category[0] in "PS" or category in {"Cc", "Cf"}:  # Cc and Cf: control characters, soft hyphens
            table[code] = _DROPPED
    return table


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Return base**i and base**-i modulo 2**64, for as many i as a chunk has code units: at most 2 per character."""
    count = 2 * CHUNK_CHARACTERS
    inverse = pow(_CHARACTER_BASE, -1, 2**64)
    bases = (np.full(count, base, np.uint64) for base in (_CHARACTER_BASE, inverse))
    powers, inverses = (np.multiply.accumulate(base) for base in bases)
    return powers, inverses
