"""Causal self-attention: with grouped queries, or of latents.

`Attention` has grouped queries, optional query and key norms, an optional gate and an optional band. Its `_project` is
the only place that makes queries, keys, values and gates, and its `forward` the only place that uses them: plain,
fused, cached and tree attention all pass through both. `LatentAttention` is DeepSeek's.

Shapes: B batch, T positions in this call, S key positions, H query heads, G key/value heads, K head size,
C = H K channels, D hidden size. Of latents: L the latent of keys and values, R the rotary key, N channels of a head
without positions, V a value head; K = N + R.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lightlm.model import fused
from lightlm.model.config import LATENT_NORM_EPS, ModelConfig
from lightlm.model.norms import RMSNorm
from lightlm.model.rotary import rotate
from lightlm.model.scaling import Linear

# Takes one layer's new keys and values (B, G, T, K) and returns all that its queries attend to, (B, G, S, K):
# `KVCache.update` or `Trees.prepend`, bound to the layer. Of latents, both are the same (B, 1, T, L + R).
KeysAndValues = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

FLEX_HEAD_DIM = 16  # the least size of a head that `flex_attention` takes on CUDA


@dataclass(frozen=True)
class Mask:
    """Which keys the queries see: arguments of `scaled_dot_product_attention`, unless documents or blocks are given."""

    # (B or 1, 1, T, S): True where a query may see a key, or floats that are added to the scores.
    # None where `is_causal` says everything.
    allowed: Tensor | None = None
    is_causal: bool = False
    # The lengths of the documents, row after row, each with the mask inside it: every document attends only to itself.
    documents: tuple[tuple[int, "Mask"], ...] = ()
    blocks: BlockMask | None = None  # for `flex_attention`


def attends_in_groups(device: torch.device, dtype: torch.dtype, *, masked: bool) -> bool:
    """Return whether a fused attention of this device takes fewer keys and values than queries.

    On CUDA only flash attention does, which takes 16-bit operands and no mask, on GPUs from Ampere on. For the rest,
    torch 2.13 would fall back to its plain attention, which holds all scores (B, H, T, S). Copied keys and values are
    smaller.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    # The properties are constants to torch.compile.
    return dtype != torch.float32 and not masked and torch.cuda.get_device_properties(device).major >= 8


def masks_by_flag(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether `is_causal` hides later tokens from all queries.

    On MPS in 16 bits it hides them from one query of four, in torch before 2.13 (pytorch#195910).
    """
    return device_type != "mps" or dtype == torch.float32


def _lower_triangle(queries: Tensor, keys: Tensor) -> Tensor:
    """Return what `is_causal` stands for, (1, 1, T, S)."""
    return torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=queries.device).tril()[None, None]


def build_mask(positions_BT: Tensor, num_keys: int, window: int, *, fresh: bool, aligned: bool) -> Mask:
    """Return the mask of queries at `positions_BT` over keys at positions 0..num_keys-1.

    Args:
        window: the number of positions that a query sees, its own included; 0 means all.
        fresh: the queries are positions 0..T-1, the same as the keys.
        aligned: all rows are at the same positions, and the last query is the last key.
    """
    num_queries = positions_BT.shape[1]
    exporting = torch.compiler.is_exporting()  # what holds for one length must hold for all
    if not window or (not exporting and window >= num_keys):
        if fresh:
            return Mask(None, is_causal=exporting or num_queries > 1)
        if aligned and num_queries == 1:
            return Mask(None, is_causal=False)
    keys_S = torch.arange(num_keys, device=positions_BT.device)
    distance_BTS = positions_BT[:, :, None] - keys_S
    allowed_BTS = distance_BTS >= 0
    if window:
        allowed_BTS &= distance_BTS < window
    return Mask(allowed_BTS[:, None], is_causal=False)


def offsets_in_documents(tokens_BT: Tensor, separator: int) -> Tensor:
    """Return each token's offset in its document (B, T), which begins with the separator or with its row."""
    return offsets_from(tokens_BT == separator)


def offsets_from(starts_BT: Tensor) -> Tensor:
    """Return each token's offset in its document (B, T); `starts_BT` says which tokens begin one, beside the row's."""
    columns_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return columns_T - torch.where(starts_BT, columns_T, 0).cummax(1).values


def build_document_mask(offsets_BT: Tensor, window: int, *, dtype: torch.dtype, head_dim: int, compiled: bool) -> Mask:
    """Return the mask of tokens that see their own document, from fresh rows without padding.

    A CPU computes each document by itself, and compiled code on CUDA skips blocks of foreign keys. Otherwise all scores
    are computed, and foreign ones are hidden.

    Args:
        offsets_BT: see `offsets_in_documents`.
        window: as in `build_mask`.
        dtype: precision of queries and keys.
        compiled: torch.compile runs the attention.
    """
    num_rows, length = offsets_BT.shape
    if offsets_BT.device.type == "cpu" and not compiled:
        starts = (offsets_BT.flatten() == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in itertools.pairwise([*starts, num_rows * length])]
        inside = {
            size: build_mask(torch.arange(size)[None], size, window, fresh=True, aligned=True) for size in set(lengths)
        }
        return Mask(documents=tuple((size, inside[size]) for size in lengths))
    reach_BT = offsets_BT.clamp(max=window - 1) if window else offsets_BT
    if offsets_BT.device.type == "cuda" and compiled and head_dim >= FLEX_HEAD_DIM:
        return Mask(blocks=_blocks(reach_BT))
    columns_T = torch.arange(length, device=offsets_BT.device)
    distance_TT = columns_T[:, None] - columns_T
    hidden_BTT = (distance_TT < 0) | (distance_TT > reach_BT[:, :, None])
    bias_BTT = torch.zeros(hidden_BTT.shape, dtype=dtype, device=offsets_BT.device)
    return Mask(bias_BTT.masked_fill_(hidden_BTT, float("-inf"))[:, None])


def _blocks(reach_BT: Tensor) -> BlockMask:
    """Return the mask of queries that see so many positions before their own."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= reach_BT[row, query])

    num_rows, length = reach_BT.shape
    return create_block_mask(sees, num_rows, None, length, length, device=reach_BT.device)


class Attention(nn.Module):
    """Multi-head attention of one layer (arXiv 1706.03762) with grouped queries (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.norm_eps = config.norm_eps
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(config, config.hidden_size, query_size, "qkv")
        self.k_proj = Linear(config, config.hidden_size, kv_size, "qkv")
        self.v_proj = Linear(config, config.hidden_size, kv_size, "qkv")
        # With separate weights, Muon orthogonalizes queries and gates apart; Qwen3.5 stores both in one matrix.
        self.gate_proj = Linear(config, config.hidden_size, query_size, "qkv") if config.attention_gate else None
        self.o_proj = Linear(config, query_size, config.hidden_size, "output")
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
        y_BHTK = attend(q_BHTK.to(k_BGSK.dtype), k_BGSK, v_BGSK.to(k_BGSK.dtype), mask)
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


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """Return the attention of each query head over the keys and values that the mask shows, (B, H, T, K).

    Args:
        scale: factor on the scores; None is 1 / sqrt(K).
    """
    num_heads, num_kv_heads = q_BHTK.shape[1], k_BGSK.shape[1]
    grouped = num_heads != num_kv_heads
    if mask.documents:
        lengths = [length for length, _ in mask.documents]
        # (B T, H or G, K), cut into documents of (1, H or G, L, K)
        qs, ks, vs = (
            [x.transpose(0, 1)[None] for x in x_BHTK.transpose(1, 2).flatten(0, 1).split(lengths)]
            for x_BHTK in (q_BHTK, k_BGSK, v_BGSK)
        )
        parts = [
            attend(q, k, v, inside, scale)[0].transpose(0, 1)
            for q, k, v, (_, inside) in zip(qs, ks, vs, mask.documents, strict=True)
        ]
        return torch.cat(parts).unflatten(0, (len(q_BHTK), -1)).transpose(1, 2)
    if mask.blocks is not None:
        y_BHTK: Tensor = flex_attention(q_BHTK, k_BGSK, v_BGSK, block_mask=mask.blocks, enable_gqa=grouped, scale=scale)
        return y_BHTK
    allowed, is_causal = mask.allowed, mask.is_causal
    if is_causal and not masks_by_flag(q_BHTK.device.type, q_BHTK.dtype):
        allowed, is_causal = _lower_triangle(q_BHTK, k_BGSK), False
    if grouped and not attends_in_groups(k_BGSK.device, k_BGSK.dtype, masked=allowed is not None):
        k_BGSK, v_BGSK = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k_BGSK, v_BGSK))
        grouped = False
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=allowed, is_causal=is_causal, enable_gqa=grouped, scale=scale
    )


class LatentAttention(nn.Module):
    """Multi-head latent attention of one layer (arXiv 2405.04434, section 2.1; DeepSeek-V3, 2412.19437).

    All heads make keys and values from one latent, which is normalized, and share one rotary key. Both depend only on
    their own position, so a cache holds them in place of keys and values. Matrices that DeepSeek joins are apart, for
    Muon: `kv_a_proj` and `k_rope_proj`, and `k_b_proj` and `v_b_proj`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        width, queries = config.hidden_size, config.num_heads * config.head_dim
        self.rank, self.rotary_dim = config.kv_lora_rank, config.rotary_dim
        if config.q_lora_rank:
            self.q_a_proj = Linear(config, width, config.q_lora_rank, "qkv")
            self.q_a_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config, config.q_lora_rank, queries, "qkv")
        else:
            self.q_proj = Linear(config, width, queries, "qkv")
        self.has_query_latent = config.q_lora_rank > 0
        self.kv_a_proj = Linear(config, width, config.kv_lora_rank, "qkv")
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.k_rope_proj = Linear(config, width, config.rotary_dim, "qkv")
        self.k_b_proj = Linear(config, config.kv_lora_rank, config.num_heads * config.qk_nope_head_dim, "qkv")
        self.v_b_proj = Linear(config, config.kv_lora_rank, config.num_heads * config.v_head_dim, "qkv")
        self.o_proj = Linear(config, config.num_heads * config.v_head_dim, width, "output")

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask, extend: KeysAndValues | None = None
    ) -> Tensor:
        """Return the attention output (B, T, D); see `Attention.forward`."""
        q_BHTK, latent_BTL, rotary_B1TR = self._project(x_BTD, rotation)
        if extend is None:
            k_BTC, v_BTC = self._linear(latent_BTL, self.k_b_proj, self.v_b_proj)
            k_BHTN, v_BHTV = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (k_BTC, v_BTC))
            y_BHTV = attend_heads(q_BHTK, k_BHTN, rotary_B1TR, v_BHTV, mask)
        else:
            new_B1TL = torch.cat((latent_BTL[:, None], rotary_B1TR), dim=-1)
            kept_B1SL, _ = extend(new_B1TL, new_B1TL)
            k_HNL, v_HVL = (
                layer.scaled().product().unflatten(0, (self.num_heads, -1)) for layer in (self.k_b_proj, self.v_b_proj)
            )
            y_BHTV = attend_latents(q_BHTK.to(kept_B1SL.dtype), kept_B1SL, k_HNL, v_HVL, mask)
        y_BTC = y_BHTV.transpose(1, 2).flatten(2)
        if fused.applies(x_BTD):
            return fused.linear(y_BTC, self.o_proj)
        return self.o_proj(y_BTC.to(x_BTD.dtype))

    def _project(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, K), the normalized latent (B, T, L) and the rotary key (B, 1, T, R)."""
        first = self.q_a_proj if self.has_query_latent else self.q_proj
        q_BTC, latent_BTL, rotary_BTR = self._linear(x_BTD, first, self.kv_a_proj, self.k_rope_proj)
        if self.has_query_latent:
            [q_BTC] = self._linear(self.q_a_norm(q_BTC), self.q_b_proj)
        q_BHTK = q_BTC.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        q_BHTN, q_BHTR = q_BHTK.split((self.head_dim - self.rotary_dim, self.rotary_dim), dim=-1)
        q_BHTK = torch.cat((q_BHTN, rotate(q_BHTR, *rotation)), dim=-1)
        return q_BHTK, self.kv_a_norm(latent_BTL), rotate(rotary_BTR[:, None], *rotation)

    def _linear(self, x: Tensor, *layers: Linear) -> list[Tensor]:
        """Return the output of each of the layers that share the input x."""
        if fused.applies(x):
            return list(fused.linear(x, *layers).split([layer.out_features for layer in layers], dim=-1))
        return [layer(x) for layer in layers]


def attend_heads(q_BHTK: Tensor, k_BHSN: Tensor, rotary_B1SR: Tensor, v_BHSV: Tensor, mask: Mask) -> Tensor:
    """Return the attention (B, H, T, V) of heads that share a rotary key."""
    k_BHSK = torch.cat((k_BHSN, rotary_B1SR.to(k_BHSN.dtype).expand(-1, k_BHSN.shape[1], -1, -1)), dim=-1)
    size, value = k_BHSK.shape[-1], v_BHSV.shape[-1]
    # Fused attention takes values as wide as keys only. Zeros change neither scores nor the values before them.
    q_BHTK, k_BHSK, v_BHSV = (F.pad(x, (0, max(size, value) - x.shape[-1])) for x in (q_BHTK, k_BHSK, v_BHSV))
    return attend(q_BHTK, k_BHSK, v_BHSV, mask, size**-0.5)[..., :value]


def attend_latents(q_BHTK: Tensor, kept_B1SL: Tensor, k_HNL: Tensor, v_HVL: Tensor, mask: Mask) -> Tensor:
    """Return the attention (B, H, T, V) over latents that lie beside rotary keys, (B, 1, S, L + R).

    The result is the same in two ways: make keys and values of every latent, or compare queries with latents. `absorbs`
    chooses the one with fewer operations.
    """
    rank, nope = k_HNL.shape[2], k_HNL.shape[1]
    if not absorbs(q_BHTK.shape[2], kept_B1SL.shape[2], k_HNL, v_HVL, q_BHTK.shape[3] - nope):
        latent_B1SL, rotary_B1SR = kept_B1SL.split((rank, kept_B1SL.shape[-1] - rank), dim=-1)
        weights = (w_HNL.flatten(0, 1).to(kept_B1SL.dtype) for w_HNL in (k_HNL, v_HVL))
        parts_BSC = (F.linear(latent_B1SL[:, 0], w_CL) for w_CL in weights)
        k_BHSN, v_BHSV = (part_BSC.unflatten(2, (len(k_HNL), -1)).transpose(1, 2) for part_BSC in parts_BSC)
        return attend_heads(q_BHTK, k_BHSN, rotary_B1SR, v_BHSV, mask)
    return attend_absorbed(q_BHTK, kept_B1SL, k_HNL, v_HVL, mask)


def absorbs(num_queries: int, num_keys: int, k_HNL: Tensor, v_HVL: Tensor, rotary_dim: int) -> bool:
    """Return whether `attend_absorbed` takes fewer multiplications than `attend_heads` with its projections."""
    (nope, rank), value = k_HNL.shape[1:], v_HVL.shape[1]
    projected = rank * (nope + value)  # per head: of each query if absorbed, else of each latent
    scored = num_queries * num_keys
    absorbed = num_queries * projected + scored * 2 * (rank + rotary_dim)
    return absorbed < num_keys * projected + scored * 2 * max(nope + rotary_dim, value)


def attend_absorbed(q_BHTK: Tensor, kept_B1SL: Tensor, k_HNL: Tensor, v_HVL: Tensor, mask: Mask) -> Tensor:
    """Return what `attend_latents` does: queries take the place of keys, and latents are the values.

    All heads share one key, so their queries are as many positions of one head.
    """
    num_heads, length = q_BHTK.shape[1:3]
    (nope, rank), scale = k_HNL.shape[1:], q_BHTK.shape[-1] ** -0.5
    q_BHTN, q_BHTR = q_BHTK.split((nope, q_BHTK.shape[-1] - nope), dim=-1)
    q_BHTL = torch.cat((q_BHTN @ k_HNL.to(q_BHTK.dtype), q_BHTR), dim=-1)
    allowed = mask.allowed
    if allowed is None and mask.is_causal:
        allowed = _lower_triangle(q_BHTK, kept_B1SL)
    if allowed is not None and length > 1:
        allowed = allowed.repeat(1, 1, num_heads, 1)
    # The rotary part of the values is not used: a slice would be copied.
    y_B1TL = attend(q_BHTL.flatten(1, 2)[:, None], kept_B1SL, kept_B1SL, Mask(allowed), scale)
    y_BHTL = y_B1TL[:, 0].unflatten(1, (num_heads, length))[..., :rank]
    return y_BHTL @ v_HVL.to(y_BHTL.dtype).transpose(1, 2)


def build_attention(config: ModelConfig) -> Attention | LatentAttention:
    """Return the attention of a block."""
    return LatentAttention(config) if config.attention == "mla" else Attention(config)
