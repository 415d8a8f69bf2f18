"""Causal self-attention: grouped queries, optional query/key norms, optional band, optional cache.

Shapes: B batch, T positions in this call, S key positions, H query heads, G key/value heads, K head size,
D hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlm.model import fused
from lightlm.model.cache import KVCache, Step
from lightlm.model.config import ModelConfig
from lightlm.model.norms import RMSNorm
from lightlm.model.rotary import rotate
from lightlm.model.trees import Trunk


@dataclass(frozen=True)
class Mask:
    """What `scaled_dot_product_attention` needs to hide the future; True in `allowed` may be seen."""

    # (B or 1, 1, T, S), or None when nothing or just the future is hidden; also what is added to scores, as floats.
    allowed: Tensor | None
    is_causal: bool


def build_mask(positions_BT: Tensor, num_keys: int, window: int, *, fresh: bool, aligned: bool) -> Mask:
    """The mask of queries at `positions_BT` over keys at positions 0..num_keys-1.

    Args:
        window: positions a query sees, its own included; 0 means all.
        fresh: the queries are positions 0..T-1, the same as the keys.
        aligned: all rows stand at the same positions, and the last query is the last key.
    """
    num_queries = positions_BT.shape[1]
    if not 0 < window < num_keys:
        if fresh:
            return Mask(None, is_causal=num_queries > 1)
        if aligned and num_queries == 1:
            return Mask(None, is_causal=False)
    keys_S = torch.arange(num_keys, device=positions_BT.device)
    distance_BTS = positions_BT[:, :, None] - keys_S
    allowed_BTS = distance_BTS >= 0
    if window:
        allowed_BTS &= distance_BTS < window
    return Mask(allowed_BTS[:, None], is_causal=False)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.norm_eps = config.norm_eps
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        cache: KVCache | Trunk | None = None,
        step: Step | None = None,
        layer: int = 0,
    ) -> Tensor:
        if cache is None and fused.applies(x_BTD):
            return self._fused(x_BTD, rotation, mask)
        batch, length, _ = x_BTD.shape
        q_BHTK = self.q_norm(self.q_proj(x_BTD).view(batch, length, self.num_heads, self.head_dim)).transpose(1, 2)
        k_BGTK = self.k_norm(self.k_proj(x_BTD).view(batch, length, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v_BGTK = self.v_proj(x_BTD).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if rotation is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, *rotation), rotate(k_BGTK, *rotation)
        if cache is not None:
            k_BGTK, v_BGTK = cache.update(layer, step, k_BGTK, v_BGTK)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK.to(k_BGTK.dtype),
            k_BGTK,
            v_BGTK.to(k_BGTK.dtype),
            attn_mask=mask.allowed,
            is_causal=mask.is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.o_proj(y_BHTK.to(x_BTD.dtype).transpose(1, 2).reshape(batch, length, -1))

    def _fused(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Mask) -> Tensor:
        joined = fused.linear(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        cos, sin = (None, None) if rotation is None else (angles[:, 0] for angles in rotation)
        norm_weights = [getattr(norm, "weight", None) for norm in (self.q_norm, self.k_norm)]
        heads = fused.HeadsFunction.apply(
            joined, self.num_heads, self.num_kv_heads, self.norm_eps, *norm_weights, cos, sin
        )
        q_BHTK, k_BGTK, v_BGTK = (part.transpose(1, 2) for part in heads)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGTK,
            v_BGTK,
            attn_mask=mask.allowed,
            is_causal=mask.is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return fused.linear(y_BHTK.transpose(1, 2).flatten(2), self.o_proj)
