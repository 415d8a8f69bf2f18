"""Rows that are trees of tokens instead of sequences, so that what several sequences begin with is computed once.

A tree lies in its row in preorder: a token, then all that follows it, branch after branch. A token sees itself and
its ancestors, at the positions that these have in their sequence, so its output is that of the sequence alone. The
idea is that of tree attention in speculative decoding (SpecInfer, arXiv 2305.09781).

Shapes: B rows, T columns, S = P + T keys: P shared ones before every tree, then the row's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightlm.model.cache import KVCache, Step


@dataclass(frozen=True)
class Trees:
    """The form of each row. A padding column is a tree of its own, whose output means nothing.

    Args:
        positions_BT: each token's position in its sequence.
        ends_BT: the column behind each token's last descendant.
        trunk: what stands before every tree: the keys and values of one sequence, its length the first position.
    """

    positions_BT: Tensor
    ends_BT: Tensor
    trunk: "Trunk | None" = None

    def bias(self, window: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, T, S): 0 where a token (row) may see another (column), minus infinity elsewhere.

        Args:
            window: positions that a token sees, its own included; 0 means all.
        """
        columns_T = torch.arange(self.positions_BT.shape[1], device=self.positions_BT.device)
        ahead_TT = columns_T[:, None] >= columns_T
        visible_BTS = ahead_TT & (columns_T[:, None] < self.ends_BT[:, None, :])
        positions_BS = self.positions_BT
        if self.trunk is not None:
            shared_P = torch.arange(self.trunk.length, device=columns_T.device).expand(len(positions_BS), -1)
            positions_BS = torch.cat((shared_P, positions_BS), dim=1)
            visible_BTS = torch.nn.functional.pad(visible_BTS, (self.trunk.length, 0), value=True)
        if window:
            visible_BTS &= self.positions_BT[:, :, None] - positions_BS[:, None, :] < window
        bias_BTS = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
        return bias_BTS.masked_fill_(~visible_BTS, float("-inf"))[:, None]


class Trunk:
    """The keys and values of one sequence, to stand before those of every row; it is read, never written.

    Args:
        cache: of one row.
    """

    def __init__(self, cache: KVCache) -> None:
        [self.length] = cache.lengths
        self._cache = cache

    def update(self, layer: int, step: Step | None, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """`KVCache.update`'s counterpart: keys and values of trunk and rows, each (B, H, S, K)."""
        joined = []
        for kept, own in ((self._cache.keys, k_BHTK), (self._cache.values, v_BHTK)):
            shared_BHPK = kept[layer, :, :, : self.length].expand(len(own), -1, -1, -1)
            joined.append(torch.cat((shared_BHPK, own.to(kept.dtype)), dim=2))
        return joined[0], joined[1]
