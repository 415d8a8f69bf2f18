"""Batches as a pure function of (seed, epoch, sample index): the loader has no state.

So a run that resumes, or that runs on another number of devices, sees the same samples in the same order. A sample is
`seq_len + 1` tokens of a train stream at `index * seq_len`: the inputs are all but the last, the targets all but the
first. Each source of a mixture has epochs and an order of its own.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from lightlm.data.hashing import mix
from lightlm.data.mixture import ONE_SOURCE, SourceOrder
from lightlm.data.shards import TokenStream
from lightlm.errors import DataError

# In theory four rounds make a Feistel network indistinguishable from random (Luby and Rackoff, 1988). Two more
# compensate for the small halves of small data sets. 10,000 indices take 10 ms.
FEISTEL_ROUNDS = 6
_64_BITS = 2**64 - 1


def permute(indices: np.ndarray, size: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """Map indices by a pseudo-random permutation of range(size), keyed by (seed, epoch, source): int64, same shape.

    Takes O(1) memory: a Feistel network on the smallest even number of bits that holds `size`, applied again to
    results outside the range (cycle walking; under four passes on average).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    key = [seed & _64_BITS, epoch, *([source] if source else [])]
    keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)
    values = indices.astype(np.uint64)
    pending = np.ones(values.shape, dtype=bool)
    while pending.any():
        left, right = values[pending] >> half, values[pending] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        values[pending] = (left << half) | right
        pending = values >= np.uint64(size)
    return values.astype(np.int64)


class _Source:
    """The samples of one source, in a new order each epoch."""

    def __init__(
        self, name: str, stream: TokenStream, seq_len: int, seed: int, number: int, *, shift_windows: bool
    ) -> None:
        self._stream, self._seq_len, self._seed, self._number = stream, seq_len, seed, number
        self.num_samples = (len(stream) - 1) // seq_len
        if self.num_samples < 1:
            raise DataError(
                f"The train split of {name} holds {len(stream)} tokens, but one sample of sequence length {seq_len} "
                f"needs {seq_len + 1}. Prepare more text, or train with a shorter sequence."
            )
        # With windows that begin later, an epoch has one sample less, of any offset that leaves so many.
        self._later = max(self.num_samples - 1, 1) if shift_windows else self.num_samples
        self._offsets = min(seq_len, len(stream) - self._later * seq_len) if shift_windows else 1

    def epochs(self, samples: int) -> float:
        """Return the epochs that this many samples are."""
        beyond = samples - self.num_samples
        return samples / self.num_samples if beyond <= 0 else 1 + beyond / self._later

    def windows(self, ranks: np.ndarray) -> list[np.ndarray]:
        """Return samples by their rank over all epochs: int64 of shape (seq_len + 1,) each."""
        epochs, positions = np.divmod(ranks - self.num_samples, self._later)
        first = ranks < self.num_samples
        epochs, positions = np.where(first, 0, epochs + 1), np.where(first, ranks, positions)
        starts = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():  # a batch may span epochs
            chosen, size = epochs == epoch, self._later if epoch else self.num_samples
            order = permute(positions[chosen], size, self._seed, epoch, self._number)
            starts[chosen] = order * self._seq_len + self._offset(epoch)
        return [self._stream.slice(start, self._seq_len + 1) for start in starts.tolist()]

    def _offset(self, epoch: int) -> int:
        """Return where the first window of an epoch begins; 0 in the first."""
        if not epoch or self._offsets == 1:
            return 0
        key = [self._seed & _64_BITS, epoch, self._number, 1]  # longer than a permutation's
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) % self._offsets


class BatchLoader:
    """Training batches from token streams, in the order of a mixture."""

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        seq_len: int,
        seed: int,
        order: SourceOrder = ONE_SOURCE,
        *,
        shift_windows: bool = False,
    ) -> None:
        """Take the train streams by name, one per source of `order`. Raise DataError for one too short for a sample."""
        self.seq_len, self.order = seq_len, order
        self._sources = [
            _Source(name, stream, seq_len, seed, number, shift_windows=shift_windows)
            for number, (name, stream) in enumerate(streams.items())
        ]

    def batch(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return samples `start` to `start + count` of the run as (inputs, targets): int64 of shape (count, seq_len).

        Counts samples over all epochs. With several processes, each requests its own part of the global batch.
        """
        numbers, ranks = self.order.locate(np.arange(start, start + count, dtype=np.int64))
        windows = np.empty((count, self.seq_len + 1), np.int64)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            windows[chosen] = self._sources[number].windows(ranks[chosen])
        return _inputs_and_targets(windows)

    def epochs(self, samples: int) -> list[float]:
        """Return the epochs of each source in the run's first `samples`."""
        counts = self.order.counts(samples).tolist()
        return [source.epochs(count) for source, count in zip(self._sources, counts, strict=True)]


def validation_batches(
    stream: TokenStream, seq_len: int, max_tokens: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the first floor(max_tokens / seq_len) windows (at least one), as (inputs, targets) like `batch`.

    The last batch may be smaller. A stream shorter than one window gives one shorter window. Raises DataError, at the
    call, where the stream holds no token to predict.
    """
    if len(stream) < 2:
        raise DataError(
            f"The validation split holds {len(stream)} tokens, but predicting one needs 2. "
            "Prepare the data with a larger --val-fraction, or train without validation."
        )
    length = min(seq_len, len(stream) - 1)
    count = max(1, min(max_tokens // length, (len(stream) - 1) // length))
    starts = range(0, count * length, length)
    return (
        _inputs_and_targets(np.stack([stream.slice(start, length + 1) for start in starts[first : first + batch_size]]))
        for first in range(0, count, batch_size)
    )


def _inputs_and_targets(windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (inputs, targets) of shape (N, T) from windows of shape (N, T + 1)."""
    tokens = torch.from_numpy(windows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
