"""Batches as a pure function of (seed, epoch, sample index): the loader has no state.

So a run that resumes, or that runs on another number of devices, sees the same samples in the same order. A sample is
`seq_len + 1` tokens of a train stream at `index * seq_len`: the inputs are all but the last, the targets all but the
first. Each source of a mixture has epochs and an order of its own.

A sample of conversations is a sequence of their packing. Targets that are not trained on are `IGNORED`.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from lightlm.data.hashing import mix
from lightlm.data.mixture import ONE_SOURCE, SourceOrder
from lightlm.data.packing import Packing, TooLong
from lightlm.data.shards import MASK_BEGINS, MASK_TRAINED, JoinedArrays, TokenStream
from lightlm.data.top_tokens import TopRecords, unpacked
from lightlm.errors import DataError

# In theory four rounds make a Feistel network indistinguishable from random (Luby and Rackoff, 1988). Two more
# compensate for the small halves of small data sets. 10,000 indices take 10 ms.
FEISTEL_ROUNDS = 6
_64_BITS = 2**64 - 1
IGNORED = -100  # a target that is not trained on: torch's `ignore_index`

Batch = tuple[torch.Tensor, ...]
"""Inputs and targets, int64 of shape (N, T). Where a source holds conversations, a third: whether an input begins a
document, bool of shape (N, T)."""


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
        return [self._stream.slice(start, self._seq_len + 1) for start in self._starts(ranks)]

    def top_records(self, ranks: np.ndarray, records: JoinedArrays) -> list[np.ndarray]:
        """Return the records of the inputs of the same samples, of shape (seq_len,) each."""
        return [records.slice(start, self._seq_len) for start in self._starts(ranks)]

    def _starts(self, ranks: np.ndarray) -> list[int]:
        epochs, positions = np.divmod(ranks - self.num_samples, self._later)
        first = ranks < self.num_samples
        epochs, positions = np.where(first, 0, epochs + 1), np.where(first, ranks, positions)
        starts = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():  # a batch may span epochs
            chosen, size = epochs == epoch, self._later if epoch else self.num_samples
            order = permute(positions[chosen], size, self._seed, epoch, self._number)
            starts[chosen] = order * self._seq_len + self._offset(epoch)
        return starts.tolist()

    def masks(self, ranks: np.ndarray) -> list[np.ndarray]:
        """Return the masks of samples of text: every token is trained on, and end-of-text begins a document."""
        return [
            np.where(window == self._stream.end_of_text_id, MASK_BEGINS, 0) | MASK_TRAINED
            for window in self.windows(ranks)
        ]

    def trained(self, ranks: np.ndarray) -> int:
        """Return the targets of samples that are trained on."""
        return len(ranks) * self._seq_len

    def _offset(self, epoch: int) -> int:
        """Return where the first window of an epoch begins; 0 in the first."""
        if not epoch or self._offsets == 1:
            return 0
        key = [self._seed & _64_BITS, epoch, self._number, 1]  # longer than a permutation's
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) % self._offsets


class _Conversations:
    """The samples of one source of conversations, in a new order each epoch."""

    def __init__(self, name: str, packing: Packing, seed: int, number: int) -> None:
        self.packing, self.num_samples = packing, len(packing)
        self._seed, self._number = seed, number
        if self.num_samples < 1:
            raise DataError(
                f"The train split of {name} holds no conversation to train on in sequences of this length "
                f"({packing.left_out:,} are left out). Train with a longer sequence, or prepare more conversations."
            )

    def epochs(self, samples: int) -> float:
        """Return the epochs that this many samples are."""
        return samples / self.num_samples

    def windows(self, ranks: np.ndarray) -> list[np.ndarray]:
        """Return samples by their rank over all epochs: int64 of shape (seq_len + 1,) each."""
        return [self.packing.sequence(number)[0] for number in self._numbers(ranks)]

    def masks(self, ranks: np.ndarray) -> list[np.ndarray]:
        """Return the masks of the same samples."""
        return [self.packing.sequence(number)[1] for number in self._numbers(ranks)]

    def trained(self, ranks: np.ndarray) -> int:
        """Return the targets of samples that are trained on."""
        return int(self.packing.trained[self._numbers(ranks)].sum())

    def top_records(self, ranks: np.ndarray, records: JoinedArrays) -> list[np.ndarray]:
        """Return the records of the inputs of the same samples, of shape (seq_len,) each."""
        return [self.packing.top_records(number, records) for number in self._numbers(ranks)]

    def _numbers(self, ranks: np.ndarray) -> list[int]:
        epochs, positions = np.divmod(ranks, self.num_samples)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            numbers[chosen] = permute(positions[chosen], self.num_samples, self._seed, epoch, self._number)
        return numbers.tolist()


def epoch_tokens(stream: TokenStream, seq_len: int, too_long: TooLong) -> int:
    """Return the tokens of an epoch of a train stream; of conversations, those of their padded sequences."""
    return len(stream) if stream.mask is None else len(Packing(stream, seq_len + 1, too_long)) * seq_len


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
        too_long: TooLong = "cut",
        taught: Sequence[JoinedArrays] = (),
    ) -> None:
        """Take the train streams by name, one per source of `order`. Raise DataError for one too short for a sample.

        `too_long` says what becomes of conversations that are longer than a sample. `taught` are the records of a
        stored teacher, see `lightlm.data.top_tokens`, for each stream.
        """
        self.taught = taught
        self.seq_len, self.order = seq_len, order
        self.packings: dict[str, Packing] = {}  # of the sources that hold conversations
        self._sources: list[_Source | _Conversations] = []
        for number, (name, stream) in enumerate(streams.items()):
            if not len(stream):
                raise DataError(
                    f"{name} has no train split: it is for scoring models only. To train on it, prepare it with a "
                    "--val-fraction below 1."
                )
            if stream.mask is None:
                self._sources.append(_Source(name, stream, seq_len, seed, number, shift_windows=shift_windows))
            else:
                self.packings[name] = Packing(stream, seq_len + 1, too_long)
                self._sources.append(_Conversations(name, self.packings[name], seed, number))

    def batch(self, start: int, count: int) -> Batch:
        """Return samples `start` to `start + count` of the run, of `seq_len` tokens each.

        Counts samples over all epochs. With several processes, each requests its own part of the global batch.
        """
        return _batch(self._read(start, count), self._read(start, count, masks=True) if self.packings else None)

    def top_tokens(self, start: int, count: int) -> TopRecords:
        """Return what the stored teacher says of the targets that `batch` gives, by token: (count x seq_len, ...)."""
        numbers, ranks = self.order.locate(np.arange(start, start + count, dtype=np.int64))
        rows = np.empty((count, self.seq_len), self.taught[0].dtype)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            rows[chosen] = self._sources[number].top_records(ranks[chosen], self.taught[number])
        return unpacked(rows.reshape(-1))

    def trained(self, start: int, count: int) -> int:
        """Return the targets that are trained on in the samples that `batch` gives."""
        numbers, ranks = self.order.locate(np.arange(start, start + count, dtype=np.int64))
        return sum(self._sources[number].trained(ranks[numbers == number]) for number in np.unique(numbers).tolist())

    def _read(self, start: int, count: int, *, masks: bool = False) -> np.ndarray:
        """Return the tokens of samples, or their masks: int64 of shape (count, seq_len + 1)."""
        numbers, ranks = self.order.locate(np.arange(start, start + count, dtype=np.int64))
        rows = np.empty((count, self.seq_len + 1), np.int64)
        for number in np.unique(numbers).tolist():
            chosen, source = numbers == number, self._sources[number]
            rows[chosen] = (source.masks if masks else source.windows)(ranks[chosen])
        return rows

    def epochs(self, samples: int) -> list[float]:
        """Return the epochs of each source in the run's first `samples`."""
        counts = self.order.counts(samples).tolist()
        return [source.epochs(count) for source, count in zip(self._sources, counts, strict=True)]


def validation_batches(
    stream: TokenStream, seq_len: int, max_tokens: int, batch_size: int, too_long: TooLong = "cut"
) -> Iterator[Batch]:
    """Yield the first floor(max_tokens / seq_len) windows (at least one), as (inputs, targets) like `batch`.

    The last batch may be smaller. A stream shorter than one window gives one shorter window. Of conversations, yields
    the first sequences of their packing. Raises DataError, at the call, where the stream holds no token to predict.
    """
    packing = None if stream.mask is None or len(stream) < 2 else Packing(stream, seq_len + 1, too_long)
    if len(stream) < 2 or (packing is not None and not len(packing)):
        raise DataError(
            f"The validation split holds {len(stream)} tokens, and none to predict in sequences of {seq_len}. Prepare "
            "the data with a larger --val-fraction."
        )
    if packing is not None:
        sequences = range(max(1, min(max_tokens // seq_len, len(packing))))
        return (
            _batch(*map(np.stack, zip(*map(packing.sequence, sequences[first : first + batch_size]), strict=True)))
            for first in range(0, len(sequences), batch_size)
        )
    length = min(seq_len, len(stream) - 1)
    count = max(1, min(max_tokens // length, (len(stream) - 1) // length))
    starts = range(0, count * length, length)
    return (
        _batch(np.stack([stream.slice(start, length + 1) for start in starts[first : first + batch_size]]))
        for first in range(0, count, batch_size)
    )


def holds_targets(stream: TokenStream, seq_len: int, too_long: TooLong = "cut") -> bool:
    """Return whether `validation_batches` finds a token to predict in a stream."""
    return len(stream) >= 2 and (stream.mask is None or len(Packing(stream, seq_len + 1, too_long)) > 0)


def _batch(windows: np.ndarray, masks: np.ndarray | None = None) -> Batch:
    """Return a batch from windows, and with conversations their masks, of shape (N, T + 1)."""
    tokens = torch.from_numpy(windows)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if masks is None:
        return inputs, targets
    marks = torch.from_numpy(masks)
    targets = torch.where((marks[:, 1:] & MASK_TRAINED) != 0, targets, IGNORED)
    return inputs, targets, ((marks[:, :-1] & MASK_BEGINS) != 0).contiguous()
