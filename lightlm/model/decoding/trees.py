"""Rows that are trees of tokens, so that a prefix that sequences share is computed once (SpecInfer, arXiv 2305.09781).

A tree lies in its row in preorder: a token, then everything that follows it, branch after branch. A token sees itself
and its ancestors, at the positions that these have in their sequence, so its output equals that of its own sequence.

Shapes: B rows, T columns, S = P + T keys: P of a prefix that all trees share, then the row's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightlm.model.decoding.cache import KVCache


@dataclass(frozen=True)
class Trees:
    """The form of each row. A padding column is a tree of its own; ignore its output.

    Args:
        positions_BT: each token's position in its sequence.
        ends_BT: for each token, the column after its last descendant.
        shared_prefix: a cache with one row, the sequence before every tree. The trees' positions begin at its length.
            It is read, never written.
    """

    positions_BT: Tensor
    ends_BT: Tensor
    shared_prefix: KVCache | None = None

    def prepend(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of prefix and rows, each (B, H, S, K)."""
        if self.shared_prefix is None:
            return k_BHTK, v_BHTK
        [length] = self.shared_prefix.lengths
        joined = []
        for kept, own in zip(self.shared_prefix.pairs[layer].unbind(1), (k_BHTK, v_BHTK), strict=False):
            shared_BHPK = kept[:, :, :length].expand(len(own), -1, -1, -1)
            joined.append(torch.cat((shared_BHPK, own.to(kept.dtype)), dim=2))
        return joined[0], joined[-1]  # the same latents, where there are no keys and values

    def bias(self, window: int, dtype: torch.dtype) -> Tensor:
        """Return (B, 1, T, S): 0 where a token (row) may see another (column), minus infinity elsewhere.

        A token sees `window` positions, its own included; 0 means all.
        """
        columns_T = torch.arange(self.positions_BT.shape[1], device=self.positions_BT.device)
        ahead_TT = columns_T[:, None] >= columns_T
        visible_BTS = ahead_TT & (columns_T[:, None] < self.ends_BT[:, None, :])
        positions_BS = self.positions_BT
        if self.shared_prefix is not None:
            [length] = self.shared_prefix.lengths
            shared_P = torch.arange(length, device=columns_T.device).expand(len(positions_BS), -1)
            positions_BS = torch.cat((shared_P, positions_BS), dim=1)
            visible_BTS = torch.nn.functional.pad(visible_BTS, (length, 0), value=True)
        if window:
            visible_BTS &= self.positions_BT[:, :, None] - positions_BS[:, None, :] < window
        bias_BTS = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
        return bias_BTS.masked_fill_(~visible_BTS, float("-inf"))[:, None]
