"""Contamination: documents that share a run of 13 words with an evaluation set.

The measure is GPT-3's (arXiv 2005.14165, appendix C), as are the words (`lightlm.data.select.ngrams`). Unlike there, a
document is taken or left whole, and a run that many documents share counts as well.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow
import xxhash

from lightlm.data.select.ngrams import ngram_hashes
from lightlm.errors import UsageError

NGRAM_WORDS = 13
MAX_SETS = 64  # a bit for each

# A table of 2**25 bits says which beginnings occur: 4 MB, which stay in the cache. The million n-grams of seven usual
# evaluation sets fill 3% of it, so that a search among them, 0.35 microseconds, is needed for so many only.
_TABLE_BITS = 25

Examples = Iterable[Sequence[str]]


class Decontaminator:
    """The n-grams of some evaluation sets. Can be pickled; 16 bytes an n-gram, and 4 MB for the table."""

    def __init__(self, sets: Mapping[str, Examples], *, drops: bool = True) -> None:
        """Takes, for each evaluation set by its name, its examples, each as the texts it is made of.

        `drops` says whether documents that share an n-gram are left out, or only counted and listed.
        Raises UsageError for more than `MAX_SETS` sets.
        """
        if len(sets) > MAX_SETS:
            raise UsageError(f"--decontaminate names {len(sets)} evaluation sets; at most {MAX_SETS} are possible")
        self.names, self.drops = list(sets), drops
        self.examples: dict[str, int] = {}
        self.too_short: dict[str, int] = {}
        ngrams, masks = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for bit, (name, examples) in enumerate(sets.items()):
            found = self._ngrams(name, examples)
            ngrams.append(found)
            masks.append(np.full(len(found), 1 << bit, np.uint64))
        joined = np.concatenate(ngrams)
        order = np.argsort(joined, kind="stable")
        self._hashes, starts = np.unique(joined[order], return_index=True)
        self._masks = np.bitwise_or.reduceat(np.concatenate(masks)[order], starts) if starts.size else joined

    def _ngrams(self, name: str, examples: Examples) -> np.ndarray:
        """The n-grams of a set; counts its examples, and those in which no text is long enough to have one."""
        pieces = [np.zeros(0, np.uint64)]
        self.examples[name] = self.too_short[name] = 0
        for example in examples:
            found = [piece for text in example for piece in ngram_hashes(text, NGRAM_WORDS)]
            pieces += found
            self.examples[name] += 1
            self.too_short[name] += not found
        return np.concatenate(pieces)

    def __call__(self, unit: str, first: int, texts: pyarrow.Array) -> dict[int, str]:
        """For each of the texts that shares an n-gram, by its index: with what; see `blocks.DocumentFilter`."""
        found = ((index, self.found_in(text)) for index, text in enumerate(texts.to_pylist()))
        return {index: f"contaminated: {', '.join(names)}" for index, names in found if names}

    @property
    def identity(self) -> str:
        """What a folder's settings say of it."""
        return f"{','.join(self.names)} ({self.fingerprint}), {'dropped' if self.drops else 'flagged'}"

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """For each set its examples, and how many of them are too short to be looked for."""
        return {name: {"examples": self.examples[name], "too_short": self.too_short[name]} for name in self.names}

    @property
    def fingerprint(self) -> str:
        """Changes with the sets' names or texts."""
        names = "\n".join(self.names).encode()
        content = self._hashes.astype("<u8").tobytes() + self._masks.astype("<u8").tobytes()
        return xxhash.xxh3_64_hexdigest(names + b"\0" + content)

    def found_in(self, text: str) -> list[str]:
        """The evaluation sets that a document shares an n-gram with, in their order."""
        mask = 0
        for hashes in ngram_hashes(text, NGRAM_WORDS):
            beginnings = (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
            possible = self._table[beginnings >> 3] >> (beginnings & 7).astype(np.uint8) & 1
            candidates = hashes[possible.astype(bool)]
            if candidates.size:
                positions = np.searchsorted(self._hashes, candidates)
                hits = positions[self._hashes[np.minimum(positions, len(self._hashes) - 1)] == candidates]
                mask |= int(np.bitwise_or.reduce(self._masks[hits], initial=np.uint64(0)))
        return [name for bit, name in enumerate(self.names) if mask >> bit & 1]

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Bit b is set if an n-gram's hash begins with the `_TABLE_BITS` bits of b: uint8 of shape (2**22,)."""
        beginnings = (self._hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
        table = np.zeros(1 << _TABLE_BITS - 3, np.uint8)
        np.bitwise_or.at(table, beginnings >> 3, np.left_shift(1, beginnings & 7).astype(np.uint8))
        return table

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}
