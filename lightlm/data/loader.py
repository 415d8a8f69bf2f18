"""Batches as a pure function of (seed, epoch, sample index): the loader has no state.

So a run that resumes, or that runs on another number of devices, sees the same samples in the same order. A sample is
`seq_len + 1` tokens of the train stream at `index * seq_len`: the inputs are all but the last, the targets all but the
first.
"""

from collections.abc import Iterator

import numpy as np
import torch

from lightlm.data.hashing import mix
from lightlm.data.shards import TokenStream
from lightlm.errors import DataError

# In theory four rounds make a Feistel network indistinguishable from random (Luby and Rackoff, 1988). Two more
# compensate for the small halves of small data sets. 10,000 indices take 10 ms.
FEISTEL_ROUNDS = 6


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Map indices by a pseudo-random permutation of range(size), keyed by (seed, epoch): int64, same shape.

    Takes O(1) memory: a Feistel network on the smallest even number of bits that holds `size`, applied again to
    results outside the range (cycle walking; under four passes on average).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed & (2**64 - 1), epoch]).generate_state(FEISTEL_ROUNDS, np.uint64)
    values = indices.astype(np.uint64)
    pending = np.ones(values.shape, dtype=bool)
    while pending.any():
        left, right = values[pending] >> half, values[pending] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        values[pending] = (left << half) | right
        pending = values >= np.uint64(size)
    return values.astype(np.int64)


class BatchLoader:
    """Training batches from a token stream, in a new order each epoch."""

    def __init__(self, stream: TokenStream, seq_len: int, seed: int) -> None:
        """Raise DataError where the stream holds too few tokens for one sample."""
        self.num_samples = (len(stream) - 1) // seq_len
        if self.num_samples < 1:
            raise DataError(
                f"The train split holds {len(stream)} tokens, but one sample of sequence length {seq_len} needs "
                f"{seq_len + 1}. Prepare more text, or train with a shorter sequence."
            )
        self.seq_len = seq_len
        self.seed = seed
        self._stream = stream

    def batch(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return samples `start` to `start + count` of the run as (inputs, targets): int64 of shape (count, seq_len).

        Counts samples over all epochs. With several processes, each requests its own part of the global batch.
        """
        epochs, positions = np.divmod(np.arange(start, start + count, dtype=np.int64), self.num_samples)
        for epoch in np.unique(epochs):  # a batch may span epochs
            chosen = epochs == epoch
            positions[chosen] = permute(positions[chosen], self.num_samples, self.seed, int(epoch))
        starts = (positions * self.seq_len).tolist()
        windows = [self._stream.slice(window, self.seq_len + 1) for window in starts]
        return _inputs_and_targets(np.stack(windows))


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
