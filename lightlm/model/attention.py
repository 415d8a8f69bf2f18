"""Causal self-attention with grouped queries, optional query and key norms, an optional gate and an optional band.

`Attention._project` is the only place that makes queries, keys, values and gates, and `Attention.forward` the only
place that uses them: plain, fused, cached and tree attention all pass through both.

Shapes: B batch, T positions in this call, S key positions, H query heads, G key/value heads, K head size,
C = H K channels, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlm.model import fused
from lightlm.model.config import ModelConfig
from lightlm.model.norms import RMSNorm
from lightlm.model.rotary import rotate
from lightlm.model.scaling import Linear

# Takes one layer's new keys and values (B, G, T, K) and returns all that its queries attend to, (B, G, S, K):
# `KVCache.update` or `Trees.prepend`, bound to the layer.
KeysAndValues = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Mask:
    """The mask arguments of `scaled_dot_product_attention`."""

    # (B or 1, 1, T, S): True where a query may see a key, or floats that are added to the scores.
    # None where `is_causal` says everything.
    allowed: Tensor | None
    is_causal: bool


def attends_in_groups(device_type: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Return whether a fused attention of this device takes fewer keys and values than queries.

    On CUDA only flash attention does, which takes 16-bit operands and no mask. For the rest, torch 2.13 would fall back
    to its plain attention, which holds all scores (B, H, T, S). Copied keys and values are smaller.
    """
    return device_type == "cpu" or (device_type == "cuda" and dtype != torch.float32 and not masked)


def build_mask(positions_BT: Tensor, num_keys: int, window: int, *, fresh: bool, aligned: bool) -> Mask:
    """Return the mask of queries at `positions_BT` over keys at positions 0..num_keys-1.

    Args:
        window: the number of positions that a query sees, its own included; 0 means all.
        fresh: the queries are positions 0..T-1, the same as the keys.
        aligned: all rows are at the same positions, and the last query is the last key.
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
    """Multi-head attention of one layer (arXiv 1706.03762) with grouped queries (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.norm_eps = config.norm_eps
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(config, config.hidden_size, query_size)
        self.k_proj = Linear(config, config.hidden_size, kv_size)
        self.v_proj = Linear(config, config.hidden_size, kv_size)
        # With separate weights, Muon orthogonalizes queries and gates apart; Qwen3.5 stores both in one matrix.
        self.gate_proj = Linear(config, config.hidden_size, query_size) if config.attention_gate else None
        self.o_proj = Linear(config, query_size, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Mask, extend: KeysAndValues | None = None
    ) -> Tensor:
        """Return the attention output (B, T, D).

        Args:
            rotation: cosines and sines, each (B or 1, 1, T, K); None with learned positions.
            extend: adds the keys and values of earlier positions; None where there are none.
        """
        q_BHTK, k_BGSK, v_BGSK, gate_BTC = self._project(x_BTD, rotation)
        if extend is not None:
            k_BGSK, v_BGSK = extend(k_BGSK, v_BGSK)
        grouped = self.num_kv_heads != self.num_heads
        if grouped and not attends_in_groups(k_BGSK.device.type, k_BGSK.dtype, masked=mask.allowed is not None):
            k_BGSK, v_BGSK = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k_BGSK, v_BGSK))
            grouped = False
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK.to(k_BGSK.dtype),
            k_BGSK,
            v_BGSK.to(k_BGSK.dtype),
            attn_mask=mask.allowed,
            is_causal=mask.is_causal,
            enable_gqa=grouped,
        )
        y_BTC = y_BHTK.transpose(1, 2).flatten(2)
        if fused.applies(x_BTD):
            return fused.linear(y_BTC if gate_BTC is None else fused.GateFunction.apply(y_BTC, gate_BTC), self.o_proj)
        if gate_BTC is not None:
            y_BTC = y_BTC * gate_BTC.sigmoid()
        return self.o_proj(y_BTC.to(x_BTD.dtype))

    def _project(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries (B, H, T, K), keys and values (B, G, T, K), normalized and rotated, and gates (B, T, C)."""
        if fused.applies(x_BTD):
            layers = (self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
            joined = fused.linear(x_BTD, *filter(None, layers))
            num_gates = 0 if self.gate_proj is None else self.num_heads
            cos, sin = (None, None) if rotation is None else (angles[:, 0] for angles in rotation)
            norm_weights = [getattr(norm, "weight", None) for norm in (self.q_norm, self.k_norm)]
            q_BTHK, k_BTGK, v_BTGK, *gates_BTHK = fused.HeadsFunction.apply(
                joined, self.num_heads, self.num_kv_heads, num_gates, self.norm_eps, *norm_weights, cos, sin
            )
            gate_BTC = gates_BTHK[0].flatten(2) if gates_BTHK else None
            return q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2), gate_BTC
        q_BHTK = self.q_norm(self.q_proj(x_BTD).unflatten(2, (self.num_heads, -1))).transpose(1, 2)
        k_BGTK = self.k_norm(self.k_proj(x_BTD).unflatten(2, (self.num_kv_heads, -1))).transpose(1, 2)
        v_BGTK = self.v_proj(x_BTD).unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2)
        if rotation is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, *rotation), rotate(k_BGTK, *rotation)
        return q_BHTK, k_BGTK, v_BGTK, None if self.gate_proj is None else self.gate_proj(x_BTD)
