"""A compact, growing set of 64-bit hashes: the memory of deduplication."""

import numpy as np

RECENT = 1 << 15  # hashes in the newest run before it is merged


class HashIndex:
    """A set of uint64 hashes that only grows: 8 bytes per hash, without Python objects.

    It consists of sorted runs, each at least twice as long as the next, as in a log-structured merge tree: a hash is
    moved log2(n / RECENT) times. A merge needs up to 16 more bytes per hash for a moment.
    """

    def __init__(self) -> None:
        self._recent = np.zeros(0, np.uint64)
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._recent) + sum(map(len, self._runs))

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Return whether each hash is in the set: bool of the same shape (n,)."""
        # In sorted order, neighboring searches touch the same cache lines.
        order = np.argsort(hashes)
        keys = hashes[order]
        found = np.zeros(len(keys), bool)
        for run in (self._recent, *self._runs):
            if len(run):
                found |= run[np.minimum(np.searchsorted(run, keys), len(run) - 1)] == keys
        result = np.empty_like(found)
        result[order] = found
        return result

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes, (n,), that are not in the set; repetitions among them are allowed."""
        self._recent = np.union1d(self._recent, hashes)
        if len(self._recent) < RECENT:
            return
        run, self._recent = self._recent, np.zeros(0, np.uint64)
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort()
        self._runs.append(run)
