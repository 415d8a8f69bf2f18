"""Conversations packed into training sequences: whole, several to a sequence, by best fit.

The packing is a function of only the conversations' lengths, so it is the same in every process and after an
interruption.
"""

from typing import Literal

import numpy as np

from lightlm.data.shards import MASK_BEGINS, MASK_TRAINED, JoinedArrays, TokenStream

TooLong = Literal["cut", "drop"]
PADDING = 0  # a token that fills the rest of a sequence; it is not trained on, and nothing else sees it


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the sequence of each item, int64 of shape (items,): best-fit decreasing.

    The longest item comes first; each goes where the least room stays (Johnson, "Near-optimal bin packing algorithms",
    1973). Sequences are numbered by their first item. Every length is from 1 to `capacity`.
    """
    sequences = np.empty(len(lengths), np.int64)
    open_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, count = 0, 0  # bit n: a sequence has room for exactly n tokens
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = open_by_room[room].pop()
            if not open_by_room[room]:
                rooms ^= 1 << room
        else:
            sequence, room, count = count, capacity, count + 1
        sequences[item] = sequence
        open_by_room[room - length].append(sequence)
        rooms |= 1 << (room - length)
    _, firsts = np.unique(sequences, return_index=True)
    numbers = np.empty(count, np.int64)
    numbers[np.argsort(firsts)] = np.arange(count)
    return numbers[sequences]


class Packing:
    """The sequences of a stream of conversations, each of at most `capacity` tokens.

    Attributes:
        cut: conversations that lose their end, because they are longer than a sequence.
        left_out: conversations without a token to train on in a sequence, and with `drop` all that are longer.
        trained: tokens of each sequence that are trained on, int64 of shape (sequences,).
    """

    def __init__(self, stream: TokenStream, capacity: int, too_long: TooLong = "cut") -> None:
        """Take a stream with masks."""
        assert stream.mask is not None
        self._stream, self._capacity = stream, capacity
        starts = stream.mask.find(MASK_BEGINS)
        lengths = np.diff(np.concatenate([starts, [len(stream)]]))
        longer = lengths > capacity
        trained = _trained(stream.mask, starts, starts + np.minimum(lengths, capacity))
        kept = trained > 0
        if too_long == "drop":
            kept &= ~longer
        self.cut, self.left_out = int((longer & kept).sum()), int((~kept).sum())
        self._starts, self._lengths = starts[kept], np.minimum(lengths, capacity)[kept]
        sequences = best_fit(self._lengths, capacity)
        self._order = np.argsort(sequences, kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(sequences))]) if len(sequences) else np.zeros(1, int)
        self.trained = np.bincount(sequences, trained[kept]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and the masks of a sequence, both int64 of shape (capacity,). Padding begins a document."""
        assert self._stream.mask is not None
        tokens, masks = np.full(self._capacity, PADDING), np.zeros(self._capacity, np.int64)
        at = 0
        for item in self._order[self._bounds[number] : self._bounds[number + 1]].tolist():
            start, length = int(self._starts[item]), int(self._lengths[item])
            tokens[at : at + length] = self._stream.slice(start, length)
            masks[at : at + length] = self._stream.mask.slice(start, length)
            masks[at] = MASK_BEGINS
            at += length
        masks[at : at + 1] = MASK_BEGINS
        return tokens, masks

    def top_records(self, number: int, records: JoinedArrays) -> np.ndarray:
        """Return the records of a sequence's inputs, of shape (capacity - 1,); those of padding are zeros."""
        found = np.zeros(self._capacity - 1, records.dtype)
        at = 0
        for item in self._order[self._bounds[number] : self._bounds[number + 1]].tolist():
            start, length = int(self._starts[item]), min(int(self._lengths[item]), self._capacity - 1 - at)
            found[at : at + length] = records.slice(start, length)
            at += length
        return found


def _trained(masks: TokenStream, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the tokens of each conversation that are trained on: int64 of the shape of `starts`.

    The first token of a conversation does not count: there is nothing to predict it from.
    """
    counts = np.zeros(len(starts), np.int64)
    for positions in masks.found(MASK_TRAINED):
        items = np.searchsorted(starts, positions, side="right") - 1
        inside = (positions > starts[items]) & (positions < ends[items])
        counts += np.bincount(items[inside], minlength=len(starts))
    return counts
