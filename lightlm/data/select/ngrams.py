"""Hashes of the n-grams of a text's words, in numpy: what near-duplicates and contamination are found by.

Words are those of GPT-3's appendix C (arXiv 2005.14165): lower case, punctuation removed, split at white space.
Punctuation is Unicode's categories P and S, so curly and straight quotes are alike; characters beyond the basic plane
are letters. A script without spaces has few words, so little is found in it.
"""

import functools
import unicodedata
from collections.abc import Iterator

import numpy as np

from lightlm.data.hashing import mix

# Characters hashed at a time: powers and intermediate arrays stay in the processor's cache, and a document takes no
# more memory than its words' hashes.
CHUNK_CHARACTERS = 1 << 16

_CHARACTER_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_WORD_BASE = 0xD6E8FEB86659FD93
_SEPARATOR, _DROPPED, _KEPT = 0, 1, 2


def ngram_hashes(text: str, size: int) -> Iterator[np.ndarray]:
    """The hashes of all runs of `size` words, uint64, in their order, in pieces; nothing for a shorter text.

    They are the same on every machine.
    """
    words = np.zeros(0, np.uint64)
    for more in word_hashes(text):
        words = np.concatenate([words, more])
        if len(words) >= size:
            yield _combine(words, size)
            words = words[len(words) - size + 1 :]


def word_hashes(text: str) -> Iterator[np.ndarray]:
    """The hash of each word, uint64, in pieces."""
    for chunk in _chunks(text):
        hashes = _hash_words(chunk.lower())
        if hashes.size:
            yield hashes


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces of about `CHUNK_CHARACTERS`, cut at white space; a longer word is cut as it comes."""
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARACTERS
        if end < len(text):
            end = max((text.rfind(space, start, end) + 1 for space in " \n\t"), default=0) or end
        yield text[start:end]
        start = end


def _hash_words(text: str) -> np.ndarray:
    """The hash of each word of a lower-case text of at most some `CHUNK_CHARACTERS`.

    A word's hash is the polynomial sum(character_i * base**i), from the sum over the stretch up to the next word, in
    which white space counts as 0, divided by the power at its start.
    """
    codes = _code_units(text)
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


def _code_units(text: str) -> np.ndarray:
    """UTF-16 code units; one byte each where the text is ASCII."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")


def _combine(words: np.ndarray, size: int) -> np.ndarray:
    hashes = words[: len(words) - size + 1].copy()
    for offset in range(1, size):
        hashes *= np.uint64(_WORD_BASE)
        hashes += words[offset : len(words) - size + 1 + offset]
    return mix(hashes)


@functools.cache
def _classes() -> np.ndarray:
    """For each UTF-16 code unit: between words, left out, or part of a word; uint8 of shape (65536,)."""
    table = np.full(65536, _KEPT, np.uint8)
    for code in range(65536):
        category = unicodedata.category(chr(code))
        if chr(code).isspace():
            table[code] = _SEPARATOR
        elif category[0] in "PS" or category in {"Cc", "Cf"}:  # the latter are control characters and soft hyphens
            table[code] = _DROPPED
    return table


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """base**i and base**-i modulo 2**64, for as many i as a chunk has code units: two a character at most."""
    count = 2 * CHUNK_CHARACTERS
    inverse = pow(_CHARACTER_BASE, -1, 2**64)
    bases = (np.full(count, base, np.uint64) for base in (_CHARACTER_BASE, inverse))
    powers, inverses = (np.multiply.accumulate(base) for base in bases)
    return powers, inverses
