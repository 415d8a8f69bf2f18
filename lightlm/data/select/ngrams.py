"""Hashes of the n-grams of a text's words, in numpy; near-duplicates and contamination are found by them.

Words are defined as in GPT-3's appendix C (arXiv 2005.14165): lower case, punctuation removed, split at white space.
Punctuation is Unicode's categories P and S, so curly and straight quotes are alike. Characters beyond the basic plane
count as letters. A script without spaces has few words, so little is found in it.
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
_SEPARATOR, _DROPPED, _KEPT = 0, 1, 2


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
    inside = classes == _KEPT
    starts = np.flatnonzero(inside & ~np.concatenate([[False], inside[:-1]]))
    if starts.size == 0:
        return np.zeros(0, np.uint64)
    powers, inverses = _powers()
    terms = powers[: len(codes)] * (codes * inside)
    return mix(np.add.reduceat(terms, starts) * inverses[starts])


def _combine(words: np.ndarray, size: int) -> np.ndarray:
    hashes = words[: len(words) - size + 1].copy()
    for offset in range(1, size):
        hashes *= np.uint64(_WORD_BASE)
        hashes += words[offset : len(words) - size + 1 + offset]
    return mix(hashes)


@functools.cache
def _classes() -> np.ndarray:
    """Return the class of each UTF-16 code unit (between words, dropped, part of a word): uint8 of shape (65536,)."""
    table = np.full(65536, _KEPT, np.uint8)
    for code in range(65536):
        category = unicodedata.category(chr(code))
        if chr(code).isspace():
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
