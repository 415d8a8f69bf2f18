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

# A table marks which hash prefixes occur: 4 MB, which fit in the processor cache. The million n-grams of seven usual
# evaluation sets fill 22% of it, so that 22% of the hashes need a binary search of 0.35 microseconds.
_PREFIX_SHIFT = np.uint64(64 - 22)

Examples = Iterable[Sequence[str]]


class Decontaminator:
    """The n-grams of some evaluation sets: 16 bytes per n-gram and 4 MB for a table. It can be pickled."""

    def __init__(self, sets: Mapping[str, Examples], *, drops: bool = True) -> None:
        """Index evaluation sets.

        Args:
            sets: the examples of each evaluation set, by its name; an example is the texts that it is made of.
            drops: whether documents that share an n-gram are left out, or only counted and listed.

        `coverage` counts for each set its examples, and those too short to have an n-gram. Raises UsageError for more
        than `MAX_SETS` sets.
        """
        if len(sets) > MAX_SETS:
            raise UsageError(f"--decontaminate names {len(sets)} evaluation sets; at most {MAX_SETS} are possible")
        self.names, self.drops = list(sets), drops
        self.coverage = {name: {"examples": 0, "too_short": 0} for name in sets}
        ngrams, masks = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for bit, (name, examples) in enumerate(sets.items()):
            for example in examples:
                found = [hashes for text in example for hashes in ngram_hashes(text, NGRAM_WORDS)]
                ngrams += found
                masks += [np.full(len(hashes), 1 << bit, np.uint64) for hashes in found]
                self.coverage[name]["examples"] += 1
                self.coverage[name]["too_short"] += not found
        joined = np.concatenate(ngrams)
        order = np.argsort(joined, kind="stable")
        self._hashes, starts = np.unique(joined[order], return_index=True)
        self._masks = np.bitwise_or.reduceat(np.concatenate(masks)[order], starts) if starts.size else joined

    def __call__(self, unit: str, first: int, texts: pyarrow.Array) -> dict[int, str]:
        """Return the cause for each text that shares an n-gram, by its index; see `blocks.DocumentFilter`."""
        found = ((index, self.found_in(text)) for index, text in enumerate(texts.to_pylist()))
        return {index: f"contaminated: {', '.join(names)}" for index, names in found if names}

    @property
    def identity(self) -> str:
        """The entry in the settings of a data folder."""
        return f"{','.join(self.names)} ({self.fingerprint}), {'dropped' if self.drops else 'flagged'}"

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
            likely = hashes[self._table[hashes >> _PREFIX_SHIFT]]
            if likely.size:
                positions = np.searchsorted(self._hashes, likely)
                hits = positions[self._hashes[np.minimum(positions, len(self._hashes) - 1)] == likely]
                mask |= int(np.bitwise_or.reduce(self._masks[hits], initial=np.uint64(0)))
        return [name for bit, name in enumerate(self.names) if mask >> bit & 1]

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Whether a hash begins with each prefix: bool of shape (2**22,)."""
        table = np.zeros(1 << 22, bool)
        table[self._hashes >> _PREFIX_SHIFT] = True
        return table

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}
