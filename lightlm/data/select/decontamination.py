"""Contamination: documents that share a run of 13 words with an evaluation set.

The measure is GPT-3's (arXiv 2005.14165, appendix C), and so are the words (`lightlm.data.select.ngrams`). In contrast
to GPT-3, a document is kept or dropped whole, and a run that many documents share counts as well.
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

# A table of 2**25 bits marks which hash prefixes occur: 4 MB, which fit in the processor cache. The million n-grams of
# seven usual evaluation sets fill 3% of it, so that only 3% of the hashes need a binary search of 0.35 microseconds.
_TABLE_BITS = 25

Examples = Iterable[Sequence[str]]


class Decontaminator:
    """The n-grams of some evaluation sets: 16 bytes per n-gram and 4 MB for the table. It can be pickled."""

    def __init__(self, sets: Mapping[str, Examples], *, drops: bool = True) -> None:
        """Index evaluation sets.

        Args:
            sets: the examples of each evaluation set, by its name; an example is the texts that it is made of.
            drops: whether documents that share an n-gram are left out, or only counted and listed.

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
        """Return the n-grams of a set; count its examples, and those in which no text is long enough to have one."""
        arrays = [np.zeros(0, np.uint64)]
        self.examples[name] = self.too_short[name] = 0
        for example in examples:
            found = [hashes for text in example for hashes in ngram_hashes(text, NGRAM_WORDS)]
            arrays += found
            self.examples[name] += 1
            self.too_short[name] += not found
        return np.concatenate(arrays)

    def __call__(self, unit: str, first: int, texts: pyarrow.Array) -> dict[int, str]:
        """Return the cause for each text that shares an n-gram, by its index; see `blocks.DocumentFilter`."""
        found = ((index, self.found_in(text)) for index, text in enumerate(texts.to_pylist()))
        return {index: f"contaminated: {', '.join(names)}" for index, names in found if names}

    @property
    def identity(self) -> str:
        """The entry in the settings of a data folder."""
        return f"{','.join(self.names)} ({self.fingerprint}), {'dropped' if self.drops else 'flagged'}"

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """For each set the count of its examples, and of those too short to have an n-gram."""
        return {name: {"examples": self.examples[name], "too_short": self.too_short[name]} for name in self.names}

    @property
    def fingerprint(self) -> str:
        """A hash of the names and the n-grams of the sets."""
        names = "\n".join(self.names).encode()
        content = self._hashes.astype("<u8").tobytes() + self._masks.astype("<u8").tobytes()
        return xxhash.xxh3_64_hexdigest(names + b"\0" + content)

    def found_in(self, text: str) -> list[str]:
        """Return the evaluation sets that a document shares an n-gram with, in their order."""
        mask = 0
        for hashes in ngram_hashes(text, NGRAM_WORDS):
            prefixes = (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
            possible = self._table[prefixes >> 3] >> (prefixes & 7).astype(np.uint8) & 1
            likely = hashes[possible.astype(bool)]
            if likely.size:
                positions = np.searchsorted(self._hashes, likely)
                hits = positions[self._hashes[np.minimum(positions, len(self._hashes) - 1)] == likely]
                mask |= int(np.bitwise_or.reduce(self._masks[hits], initial=np.uint64(0)))
        return [name for bit, name in enumerate(self.names) if mask >> bit & 1]

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """A table whose bit b is set if a hash begins with the `_TABLE_BITS` bits of b: uint8 of shape (2**22,)."""
        prefixes = (self._hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
        table = np.zeros(1 << _TABLE_BITS - 3, np.uint8)
        np.bitwise_or.at(table, prefixes >> 3, np.left_shift(1, prefixes & 7).astype(np.uint8))
        return table

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}
