"""A compact, growing set of 64-bit hashes: the memory of deduplication."""

from dataclasses import dataclass

import numpy as np

# Hashes stay in a plain sorted array up to this count; each run costs 256 KB for the offsets of its buckets.
RECENT = 1 << 15
_BUCKETS = 1 << 16


class HashIndex:
    """A set of uint64 hashes that only grows, without Python objects.

    It consists of sorted runs, each at least twice as long as the next, as in a log-structured merge tree: a hash is
    moved log2(n / RECENT) times. A hash takes 8 bytes, or 4 with `compact`. Then only its first 48 bits count, so that
    a new hash is taken for a known one with probability n / 2**48 (1 in 28 million at n = 10 million). A merge needs up
    to 24 bytes per hash for a moment.
    """

    def __init__(self, *, compact: bool = False) -> None:
        self._compact = compact
        self._recent = np.zeros(0, np.uint64)
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return len(self._recent) + sum(len(run.stored) for run in self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes of the hashes between merges."""
        return self._recent.nbytes + sum(run.stored.nbytes + run.offsets.nbytes for run in self._runs)

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Return whether each hash is in the set: bool of the same shape (n,)."""
        keys = self._keys(hashes)
        # In sorted order, neighboring searches touch the same cache lines.
        order = np.argsort(keys)
        ordered = keys[order]
        found = _in_sorted(self._recent, ordered)
        for run in self._runs:
            found |= run.contains(ordered)
        result = np.empty_like(found)
        result[order] = found
        return result

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes, (n,), that are not in the set; repetitions among them are allowed."""
        self._recent = np.union1d(self._recent, self._keys(hashes))
        if len(self._recent) < RECENT:
            return
        keys, self._recent = self._recent, np.zeros(0, np.uint64)
        while self._runs and len(self._runs[-1].stored) < 2 * len(keys):
            keys = np.concatenate([self._runs.pop().keys(), keys])
            keys.sort()
        self._runs.append(_Run.of(keys, self._compact))

    def _keys(self, hashes: np.ndarray) -> np.ndarray:
        return hashes & ~np.uint64(0xFFFF) if self._compact else hashes


@dataclass(frozen=True)
class _Run:
    """Sorted hashes in buckets by their first 16 bits: bucket b is `stored[offsets[b]:offsets[b + 1]]`.

    `stored` has whole hashes (uint64), or their bits 16 to 48 (uint32), which sort alike within a bucket.
    """

    stored: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, compact: bool) -> "_Run":
        borders = np.arange(1, _BUCKETS, dtype=np.uint64) << np.uint64(48)
        offsets = np.concatenate([[0], np.searchsorted(keys, borders), [len(keys)]]).astype(np.uint32)
        return cls((keys >> np.uint64(16)).astype(np.uint32) if compact else keys, offsets)

    def keys(self) -> np.ndarray:
        """Return the hashes as uint64, ascending."""
        if self.stored.dtype == np.uint64:
            return self.stored
        keys = np.repeat(np.arange(_BUCKETS, dtype=np.uint64) << np.uint64(48), np.diff(self.offsets))
        rest = self.stored.astype(np.uint64)
        rest <<= np.uint64(16)  # in place: each array takes 80 MB for 10 million hashes
        keys |= rest
        return keys

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Return which keys are in the run: a binary search in the bucket of each, step by step for all."""
        if self.stored.dtype == np.uint64:
            return _in_sorted(self.stored, keys)
        wanted = (keys >> np.uint64(16)).astype(np.uint32)
        buckets = (keys >> np.uint64(48)).astype(np.int64)
        low, end = self.offsets[buckets].astype(np.int64), self.offsets[buckets + 1].astype(np.int64)
        high = end.copy()
        last = len(self.stored) - 1
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) >> 1
            below = (self.stored[np.minimum(middle, last)] < wanted) & (low < high)
            low = np.where(below, middle + 1, low)
            high = np.where(below, high, middle)
        return (low < end) & (self.stored[np.minimum(low, last)] == wanted)


def _in_sorted(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if known.size == 0:
        return np.zeros(len(keys), bool)
    positions = np.searchsorted(known, keys)
    return known[np.minimum(positions, len(known) - 1)] == keys
