"""Deduplication: exact by a hash of the text, near by MinHash; the first of several duplicates stays.

There are two steps. `Signer` turns texts into signatures, on any worker and in any order. `Deduplicator` reads the
signatures in the source's order and decides. Its decisions depend only on that order, not on batches, workers or
interruptions.

Near-duplicates: R-MinHash (`rensa`) signs the set of 5-grams of a document's words with 112 numbers, cut into 14 bands
of 8, the figures of FineWeb (arXiv 2406.17557). Two documents that agree in a band are near-duplicates. Sets of Jaccard
similarity s do so with probability 1 - (1 - s**8)**14: 5% at 0.5, 77% at 0.75, 92% at 0.8.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xxhash

from lightlm.data.hashing import mix
from lightlm.data.select.hash_index import HashIndex
from lightlm.data.select.ngrams import ngram_hashes, word_hashes
from lightlm.errors import DataError

Mode = Literal["exact", "near"]

KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE = 0, 1, 2

SHINGLE_WORDS = 5
BANDS, ROWS = 14, 8
SEED = 1


class Signer:
    """Turns texts into signatures. It can be pickled. Creating one raises DataError where a package is missing."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        if mode == "near":
            _rensa()

    @property
    def columns(self) -> int:
        """Hashes per signature."""
        return 1 + BANDS * (self.mode == "near")

    @property
    def method(self) -> str:
        """The method of the signatures; those of different methods cannot be compared."""
        if self.mode == "exact":
            return "xxh3_64"
        algorithm = f"R-MinHash {_rensa().RMinHash.ALGORITHM_VERSION}"
        return f"xxh3_64, {SHINGLE_WORDS}-grams, {algorithm}, {BANDS} bands of {ROWS}"

    def sign(self, texts: Sequence[str]) -> np.ndarray:
        """Return the signatures of the texts: uint64 of shape (len(texts), columns), the exact hash first."""
        exact = np.fromiter((xxhash.xxh3_64_intdigest(text.encode()) for text in texts), np.uint64, len(texts))
        if self.mode == "exact":
            return exact.reshape(-1, 1)
        if not texts:
            return np.zeros((0, self.columns), np.uint64)
        return np.column_stack([exact, _bands([shingles(text) for text in texts])])

    def of_hash(self, exact: int) -> np.ndarray:
        """Return the signature of a text too large for shingles, from its hash: near to no other; (1, columns)."""
        bands = mix(np.arange(1, self.columns, dtype=np.uint64) + np.uint64(exact))
        return np.concatenate([[np.uint64(exact)], bands]).reshape(1, -1)


class Deduplicator:
    """Decides in the source's order which documents stay: those that do not repeat an earlier one that stays.

    It holds 8 bytes per document that stays for `exact`, and 15 * 8 = 120 for `near`; merging hashes needs more for a
    moment.
    """

    def __init__(self, mode: Mode) -> None:
        self._indexes = [HashIndex() for _ in range(1 + BANDS * (mode == "near"))]  # the exact hashes, then the bands

    @property
    def nbytes(self) -> int:
        """Bytes of the hashes between merges."""
        return 8 * sum(map(len, self._indexes))

    def remember(self, signatures: np.ndarray) -> None:
        """Add documents (n, columns) that stay, as an earlier process decided."""
        for index, column in zip(self._indexes, signatures.T, strict=True):
            index.add(column)

    def decide(self, signatures: np.ndarray) -> np.ndarray:
        """Return KEPT, EXACT_DUPLICATE or NEAR_DUPLICATE for the next documents (n, columns): uint8 of shape (n,)."""
        if signatures.shape[1] != len(self._indexes):
            raise ValueError(f"signatures have {signatures.shape[1]} hashes; expected {len(self._indexes)}")
        repeats = [index.contains(column) for index, column in zip(self._indexes, signatures.T, strict=True)]
        verdicts = np.where(np.any(repeats, axis=0), NEAR_DUPLICATE, KEPT).astype(np.uint8)
        verdicts[repeats[0]] = EXACT_DUPLICATE
        # The documents that repeat one that stays among these.
        seen: list[set[int]] = [set() for _ in self._indexes]
        for document, keys in enumerate(signatures.tolist()):
            hits = [key in known for key, known in zip(keys, seen, strict=True)]
            if hits[0]:
                verdicts[document] = EXACT_DUPLICATE
            elif any(hits) and verdicts[document] == KEPT:
                verdicts[document] = NEAR_DUPLICATE
            if verdicts[document] == KEPT:
                for key, known in zip(keys, seen, strict=True):
                    known.add(key)
        self.remember(signatures[verdicts == KEPT])
        return verdicts


def shingles(text: str) -> np.ndarray:
    """Return the hashes of a text's 5-grams; if it has none, a hash of all its words, or of the text without words."""
    ngrams = list(ngram_hashes(text, SHINGLE_WORDS))
    if ngrams:
        return np.concatenate(ngrams)
    words = b"".join(hashes.astype("<u8").tobytes() for hashes in word_hashes(text))
    return np.array([xxhash.xxh3_64_intdigest(words or text.encode())], np.uint64)


def _bands(documents: list[np.ndarray]) -> np.ndarray:
    """Return the hashes of each document's bands: uint64 of shape (documents, BANDS)."""
    ends = np.cumsum([0, *(len(shingles) for shingles in documents)]).astype(np.uint64)
    flat = np.concatenate(documents)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, BANDS * ROWS, SEED)
    rows = np.array(matrix.to_rows(), np.uint64).reshape(-1, BANDS, ROWS)
    hashes = np.zeros(rows.shape[:2], np.uint64)
    for row in range(ROWS):
        hashes = mix(hashes * np.uint64(3) + rows[:, :, row])
    return hashes


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise DataError(
            "--dedup near needs the package rensa, which has no wheel for this platform or is not installed: "
            "pip install rensa. Exact duplicates (--dedup exact) are found without it."
        ) from None
    return rensa
