"""The key/value cache of incremental decoding.

Shapes: B batch, T positions in this call, S cache slots, H key/value heads, K head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightlm.model.config import ModelConfig


@dataclass(frozen=True)
class Step:
    """The slots of one chunk of tokens, the same for every layer of one forward call."""

    starts: list[int]  # per row, the slot of the chunk's first token
    counts: list[int]  # per row, how many of the chunk's T columns are tokens; the rest is padding on the right
    positions_BT: Tensor  # the position of each column; padding is clamped to the last slot
    end: int  # the number of slots that the longest row uses after this chunk
    # The rows, slots and columns to write, one of each per token; None if all rows are full and start at the same slot.
    places: tuple[Tensor, Tensor, Tensor] | None


class KVCache:
    """Keys and values (depth, B, H, slots, K) of every layer, with one length per row.

    Both are parts of `pairs` (depth, B, 2, H, slots, K), so that one call writes both. Latent attention has one tensor
    in their place (`ModelConfig.cached_shape`), which both names mean.

    Slot p of a row holds position p. Prompts of different lengths are padded on the right: a padding column is never
    written, and the causal mask hides every slot that a row has not reached.

    Rows may be added and removed; `reserve` makes room for them.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        tensors, heads, size = config.cached_shape
        shape = (config.depth, batch_size, tensors, heads, max_len, size)
        self._all = torch.zeros(shape, device=device, dtype=dtype)  # its first rows are in use
        self.lengths = [0] * batch_size
        self._limit = config.max_seq_len

    # Views are made when they are asked for, since autograd refuses to write to those of another grad mode.
    @property
    def pairs(self) -> Tensor:
        """Keys and values of the rows in use."""
        return self._all[:, : len(self.lengths)]

    @property
    def keys(self) -> Tensor:
        """The keys of the rows in use."""
        return self.pairs[:, :, 0]

    @property
    def values(self) -> Tensor:
        """The values of the rows in use."""
        return self.pairs[:, :, -1]

    @property
    def max_len(self) -> int:
        """The number of slots of each row."""
        return self.keys.shape[3]

    def begin(self, batch_size: int, num_columns: int, counts: list[int] | None) -> Step:
        """Reserve slots for a chunk of `num_columns` columns. The first counts[b] columns of row b are tokens.

        Raises:
            ValueError: the batch size differs from the cache's, or a row would overflow.
        """
        counts = [num_columns] * batch_size if counts is None else list(counts)
        if not len(self.lengths) == batch_size == len(counts):
            raise ValueError(f"the cache holds {len(self.lengths)} rows, the batch {batch_size}, counts {len(counts)}")
        starts = list(self.lengths)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        if max(ends) > self.max_len:
            raise ValueError(f"the cache has {self.max_len} slots, {max(ends)} are needed")
        positions = torch.tensor(starts)[:, None] + torch.arange(num_columns)
        places = None
        if any(count < num_columns for count in counts) or len(set(starts)) > 1:
            rows, columns = (torch.arange(num_columns) < torch.tensor(counts)[:, None]).nonzero(as_tuple=True)
            index_3N = torch.stack((rows, positions[rows, columns], columns)).to(self.keys.device)
            places = (index_3N[0], index_3N[1], index_3N[2])
        positions = positions.clamp(max=self.max_len - 1).to(self.keys.device)
        return Step(starts, counts, positions, max(ends), places)

    def update(self, step: Step, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk's keys and values and return those of all slots in use, each (B, H, step.end, K)."""
        pairs = self.pairs[layer]
        parts = [pairs[:, index] for index in range(pairs.shape[1])]  # `unbind` makes views that autograd refuses
        for kept_BHSK, new_BHTK in zip(parts, (k_BHTK, v_BHTK), strict=False):  # latents are only written once
            if step.places is None:
                kept_BHSK[:, :, step.starts[0] : step.end] = new_BHTK
            else:
                rows, slots, columns = step.places
                # Two index tensors around a slice put the indexed pairs first: (pairs, H, K).
                kept_BHSK[rows, :, slots] = new_BHTK[rows, :, columns].to(kept_BHSK.dtype)
        return parts[0][:, :, : step.end], parts[-1][:, :, : step.end]

    def commit(self, step: Step) -> None:
        """Advance every row past the chunk, once all layers have stored it."""
        self.lengths = [start + count for start, count in zip(step.starts, step.counts, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Keep only these rows, in this order. A repeated row is copied, to sample a prompt many times."""
        index = torch.tensor(rows, device=self.keys.device)
        self._all = self.pairs.index_select(1, index)
        self.lengths = [self.lengths[row] for row in rows]

    @property
    def room(self) -> tuple[int, int]:
        """The rows and slots that memory is reserved for."""
        return self._all.shape[1], self._all.shape[4]

    def reserve(self, num_rows: int, num_slots: int) -> None:
        """Make room for so many rows and slots in all. Less than there is changes nothing.

        Raises:
            ValueError: the model's max_seq_len is less.
        """
        if num_slots > self._limit:
            raise ValueError(f"{num_slots} positions are needed, max_seq_len is {self._limit}")
        room = max(num_rows, self.room[0]), max(num_slots, self.room[1])
        if room == self.room:
            return
        rows, used = len(self.lengths), max(self.lengths, default=0)
        depth, _, pair, heads, _, size = self._all.shape
        new = self._all.new_zeros(depth, room[0], pair, heads, room[1], size)
        new[:, :rows, :, :, :used] = self._all[:, :rows, :, :, :used]
        self._all = new

    def append(self, other: "KVCache", row: int) -> None:
        """Copy a row of another cache of the same model behind the last row, for which there must be room."""
        length = other.lengths[row]
        self.lengths.append(length)
        self.pairs[:, -1, :, :, :length] = other.pairs[:, row, :, :, :length]

    def cut(self, row: int, length: int) -> None:
        """Forget a row's positions from `length` on. The next tokens overwrite them."""
        self.lengths[row] = min(length, self.lengths[row])

    def remove(self, row: int) -> None:
        """Remove a row; the last row takes its place. Without rows, memory is freed."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        if row != last:
            self.pairs[:, row, :, :, :length] = self.pairs[:, last, :, :, :length]
            self.lengths[row] = length
        self.lengths.pop()
        if not self.lengths:
            self._all = self._all[:, :0, :, :, :0].clone()
