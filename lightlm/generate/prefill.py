"""Read a prompt into a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightlm.generate.step.fast import FastForward
from lightlm.model.decoding.cache import KVCache
from lightlm.model.transformer import Transformer

_PIECE = 2048  # most tokens in a forward pass; more take more memory and no less time


@torch.no_grad()
def read(forward: FastForward | Transformer, ids: Sequence[int], cache: KVCache) -> Tensor:
    """Read ids, at least one, into a cache of one row and return the logits (1, V) of the next token."""
    for start in range(0, len(ids), _PIECE):
        tokens_1T = torch.tensor([ids[start : start + _PIECE]], device=cache.keys.device)
        x_1TD = forward.hidden_states(tokens_1T, cache)
    return forward.head(x_1TD[:, -1])
