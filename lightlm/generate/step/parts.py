"""The layers of `FastForward`: few operations each, with joined and prepared weights.

Shapes: B rows, T positions, N = B T tokens, D hidden size, H query heads, G key/value heads, R = H / G queries that
share a key, K head size, C = H K channels, F intermediate size, S cache slots, E experts, X choices. Of latents: L the
latent, R the rotary key, N (in weights) channels of a head without positions, V a value head.
"""

import itertools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlm.model.attention import Attention, LatentAttention, Mask, attend, attend_latents
from lightlm.model.config import ModelConfig
from lightlm.model.mlp import MLP, SwiGLU
from lightlm.model.moe import MoE
from lightlm.model.norms import RMSNorm
from lightlm.model.products import Product
from lightlm.model.scaling import Linear, Scaled
from lightlm.model.transformer import Block, Residual

Prepare = Callable[[Tensor, Tensor | None], Product]  # turns a weight and its bias into a product
Rotation = tuple[Tensor, Tensor] | None  # cosines and signed sines, each (N, 1, K)

_TOGETHER_ROWS = 32  # above so many tokens, each expert gets enough of them for products of its own


class FastAttention:
    """Attention of one layer, with joined projections."""

    def __init__(self, attention: Attention, config: ModelConfig, prepare: Prepare) -> None:
        self._sizes = [config.num_heads, 2 * config.num_kv_heads]
        self._groups, self._half, self.eps = config.num_kv_heads, config.head_dim // 2, config.norm_eps
        self._rotated = config.num_heads + config.num_kv_heads
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        if attention.gate_proj is not None:
            layers.append(attention.gate_proj)
            self._sizes.append(config.num_heads)
        self.projections, self.output = _joined(prepare, *layers), _joined(prepare, attention.o_proj)
        self.norm_HK: Tensor | None = None
        if config.qk_norm:
            norms = ((attention.q_norm, config.num_heads), (attention.k_norm, config.num_kv_heads))
            self.norm_HK = torch.cat([_weight(norm).expand(count, -1) for norm, count in norms])

    def project(self, x_ND: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries (N, H, K), keys beside values (N, 2, G, K), and gates (N, C) if there are any."""
        heads_NHK = self.projections(x_ND).view(len(x_ND), sum(self._sizes), -1)
        turned_NHK = heads_NHK[:, : self._rotated]
        if self.norm_HK is not None:
            turned_NHK.copy_(F.rms_norm(turned_NHK, turned_NHK.shape[-1:], None, self.eps) * self.norm_HK)
        if rotation is not None:
            swapped_NHK = turned_NHK.roll(self._half, -1)
            turned_NHK.mul_(rotation[0]).addcmul_(swapped_NHK, rotation[1])
        q_NHK, pairs_NHK, *gates = heads_NHK.split_with_sizes(self._sizes, 1)
        pairs_N2GK = pairs_NHK.view(len(x_ND), 2, self._groups, -1)
        return q_NHK, pairs_N2GK, gates[0].flatten(1) if gates else None

    def attend(self, q_NHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask, gate_NC: Tensor | None) -> Tensor:
        """Return the output (N, D)."""
        dtype, batch = q_NHK.dtype, len(k_BGSK)
        if dtype != k_BGSK.dtype:
            q_NHK = q_NHK.to(k_BGSK.dtype)
        if len(q_NHK) == batch:
            y_NC = self._attend_once(q_NHK, k_BGSK, v_BGSK, mask.allowed)
        else:
            y_BHTK = attend(q_NHK.unflatten(0, (batch, -1)).transpose(1, 2), k_BGSK, v_BGSK, mask)
            y_NC = y_BHTK.transpose(1, 2).flatten(2).flatten(0, 1)
        if dtype != k_BGSK.dtype:
            y_NC = y_NC.to(dtype)
        return self.output(y_NC if gate_NC is None else y_NC * gate_NC.sigmoid())

    def _attend_once(self, q_BHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias: Tensor | None) -> Tensor:
        """Return the attention (B, C) of one position. Queries that share a key are as many positions of one head."""
        batch, num_heads, size = q_BHK.shape
        shared = num_heads // self._groups
        # A view: unflatten and slices take several times as long.
        q_BGRK = q_BHK.view(batch, self._groups, shared, size)
        if shared == 1 and k_BGSK.dtype == torch.bfloat16:
            # For one query, torch takes a product of oneDNN that is 5 times as slow as for two (AMD EPYC, 150 keys).
            y_BG2K = F.scaled_dot_product_attention(q_BGRK.expand(-1, -1, 2, -1), k_BGSK, v_BGSK, attn_mask=bias)
            return y_BG2K[:, :, 0].flatten(1)
        return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=bias).flatten(1)


class FastLatentAttention:
    """Latent attention of one layer, with joined projections. Those from latents are not rounded to int8."""

    def __init__(self, attention: LatentAttention, config: ModelConfig, prepare: Prepare, dtype: torch.dtype) -> None:
        self._heads, self._nope, self._half = config.num_heads, config.qk_nope_head_dim, config.rotary_dim // 2
        has_latent = config.q_lora_rank > 0
        first = attention.q_a_proj if has_latent else attention.q_proj
        self._sizes = [first.out_features, config.kv_lora_rank, config.rotary_dim]
        self.inputs = _joined(prepare, first, attention.kv_a_proj, attention.k_rope_proj)
        self.queries = _joined(prepare, attention.q_b_proj) if has_latent else None
        self.query_norm = FastNorm(attention.q_a_norm, dtype) if has_latent else None
        self.norm, self.output = FastNorm(attention.kv_a_norm, dtype), _joined(prepare, attention.o_proj)
        self.k_HNL, self.v_HVL = (
            _multiplied(layer.scaled()).unflatten(0, (config.num_heads, -1))
            for layer in (attention.k_b_proj, attention.v_b_proj)
        )

    def project(self, x_ND: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, None]:
        """Return queries (N, H, K) and latents beside rotary keys (N, 1, 1, L + R)."""
        assert rotation is not None
        q_NC, latent_NL, rotary_NR = self.inputs(x_ND).split_with_sizes(self._sizes, 1)
        if self.queries is not None and self.query_norm is not None:
            q_NC = self.queries(self.query_norm(q_NC.float()))
        q_NHK = q_NC.unflatten(1, (self._heads, -1))
        q_NHK = torch.cat((q_NHK[..., : self._nope], self._turned(q_NHK[..., self._nope :], rotation)), -1)
        kept_NL = torch.cat((self.norm(latent_NL.float()), self._turned(rotary_NR[:, None], rotation)[:, 0]), 1)
        return q_NHK, kept_NL[:, None, None], None

    def _turned(self, x_NHR: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return torch.addcmul(x_NHR * rotation[0], x_NHR.roll(self._half, -1), rotation[1])

    def attend(self, q_NHK: Tensor, kept_B1SL: Tensor, _: Tensor, mask: Mask, __: Tensor | None) -> Tensor:
        """Return the output (N, D)."""
        q_BHTK = q_NHK.unflatten(0, (len(kept_B1SL), -1)).transpose(1, 2).to(kept_B1SL.dtype)
        y_BHTV = attend_latents(q_BHTK, kept_B1SL, self.k_HNL, self.v_HVL, mask)
        return self.output(y_BHTV.transpose(1, 2).flatten(2).flatten(0, 1).to(q_NHK.dtype))


class FastSwiGLU:
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, both: Product, down: Product) -> None:
        self.both, self.down = both, down

    @classmethod
    def of(cls, mlp: SwiGLU, prepare: Prepare) -> "FastSwiGLU":
        return cls(_joined(prepare, mlp.gate_proj, mlp.up_proj), _joined(prepare, mlp.down_proj))

    def __call__(self, x_ND: Tensor) -> Tensor:
        gate_NF, up_NF = self.both(x_ND).chunk(2, -1)
        return self.down(F.silu(gate_NF).mul_(up_NF))


class FastMLP:
    """down(act(up(x)))."""

    def __init__(self, mlp: MLP, prepare: Prepare) -> None:
        self.up, self.down = _joined(prepare, mlp.up_proj), _joined(prepare, mlp.down_proj)
        self.activation, self._activate = mlp.activation, mlp.activate

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self.down(self._activate(self.up(x_ND)))


class FastMoE:
    """A mixture of experts. One token reads the weights of its experts only.

    Some tokens choose most of the experts between them: then all experts are one network, whose hidden features count
    as much as the router says. That is two products in place of two for each expert.

    Args:
        together: prepare the experts as one network too.
    """

    def __init__(self, moe: MoE, prepare: Prepare, together: bool) -> None:
        self.router = moe.router
        self.shared = None if moe.shared is None else FastSwiGLU.of(moe.shared, prepare)
        gate_EFD, up_EFD, down_EDF = (_multiplied(part) for part in moe.experts.scaled())
        self._num_experts = len(gate_EFD)
        self.both = [prepare(torch.cat(pair), None) for pair in zip(gate_EFD, up_EFD, strict=True)]
        self.down = [prepare(down_DF, None) for down_DF in down_EDF]
        self._all: tuple[Product, Product] | None = None
        if together:
            both_CD, down_DC = torch.cat((gate_EFD, up_EFD)).flatten(0, 1), down_EDF.transpose(0, 1).flatten(1)
            self._all = prepare(both_CD, None), prepare(down_DC, None)

    def __call__(self, x_ND: Tensor) -> Tensor:
        ids_NX, weights_NX, _, _ = self.router(x_ND)
        if len(x_ND) == 1:
            y_ND = self._one(x_ND, ids_NX[0].tolist(), weights_NX[0])
        elif self._all and len(x_ND) <= _TOGETHER_ROWS and ids_NX.numel() >= self._num_experts:
            y_ND = self._together(x_ND, ids_NX, weights_NX, *self._all)
        else:
            y_ND = self._apart(x_ND, ids_NX, weights_NX)
        return y_ND if self.shared is None else y_ND.add_(self.shared(x_ND))

    def _one(self, x_1D: Tensor, experts: list[int], weights_X: Tensor) -> Tensor:
        gate_XF, up_XF = torch.cat([self.both[expert](x_1D) for expert in experts]).chunk(2, -1)
        h_XF = F.silu(gate_XF).mul_(up_XF).mul_(weights_X[:, None])
        parts = [self.down[expert](h_1F) for expert, h_1F in zip(experts, h_XF.split(1), strict=True)]
        return torch.stack(parts).sum(0)

    def _together(self, x_ND: Tensor, ids_NX: Tensor, weights_NX: Tensor, both: Product, down: Product) -> Tensor:
        gate_NC, up_NC = both(x_ND).chunk(2, -1)
        weights_NE = weights_NX.new_zeros(len(x_ND), self._num_experts).scatter_(1, ids_NX, weights_NX)
        h_NEF = F.silu(gate_NC).mul_(up_NC).view(len(x_ND), self._num_experts, -1)
        return down(h_NEF.mul_(weights_NE[..., None]).flatten(1))

    def _apart(self, x_ND: Tensor, ids_NX: Tensor, weights_NX: Tensor) -> Tensor:
        y_ND = torch.zeros_like(x_ND)
        choices = sorted(
            (expert, row, place) for row, ids in enumerate(ids_NX.tolist()) for place, expert in enumerate(ids)
        )
        for expert, chosen in itertools.groupby(choices, key=lambda choice: choice[0]):
            _, rows, places = (torch.tensor(part, device=x_ND.device) for part in zip(*chosen, strict=True))
            gate_NF, up_NF = self.both[expert](x_ND[rows]).chunk(2, -1)
            part_ND = self.down[expert](F.silu(gate_NF).mul_(up_NF)) * weights_NX[rows, places, None]
            y_ND.index_add_(0, rows, part_ND.to(y_ND.dtype))
        return y_ND


def feed_forward(mlp: nn.Module, prepare: Prepare, together: bool) -> "FastSwiGLU | FastMLP | FastMoE":
    """Return what computes a feed-forward network; see `FastMoE` for `together`."""
    if isinstance(mlp, MoE):
        return FastMoE(mlp, prepare, together)
    if isinstance(mlp, SwiGLU):
        return FastSwiGLU.of(mlp, prepare)
    assert isinstance(mlp, MLP)
    return FastMLP(mlp, prepare)


class FastNorm:
    """A norm of fp32 rows (N, D), whose output has the given precision."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(norm, (RMSNorm, nn.LayerNorm))
        self.weight_D = _weight(norm).float()
        self.bias_D = None if getattr(norm, "bias", None) is None else cast(Tensor, norm.bias).detach().float()
        self.is_rms, self.eps = isinstance(norm, RMSNorm), cast(float, norm.eps)
        self._eps = torch.tensor(self.eps, device=self.weight_D.device)
        self._dtype = dtype

    def __call__(self, x_ND: Tensor) -> Tensor:
        if not self.is_rms:
            y_ND = F.layer_norm(x_ND, self.weight_D.shape, self.weight_D, self.bias_D, self.eps)
        else:
            # In 5 operations; torch's own takes 8 on a CPU.
            length_N1 = torch.linalg.vector_norm(x_ND, 2, -1, True)
            scale_N1 = torch.addcmul(self._eps, length_N1, length_N1, value=1 / len(self.weight_D)).rsqrt_()
            y_ND = (x_ND * scale_N1).mul_(self.weight_D)
        return y_ND if self._dtype == torch.float32 else y_ND.to(self._dtype)


class FastBlock:
    """The layers of a block, and the factors of its two residual branches."""

    def __init__(self, block: Block, config: ModelConfig, dtype: torch.dtype, prepare: Prepare, together: bool) -> None:
        self.norm = FastNorm(block.attention_norm, dtype)
        self.attention: FastAttention | FastLatentAttention
        if isinstance(block.attention, LatentAttention):
            self.attention = FastLatentAttention(block.attention, config, prepare, dtype)
        else:
            self.attention = FastAttention(block.attention, config, prepare)
        self.factor = _factor(block.attention_residual)
        self.mlp_norm = FastNorm(block.mlp_norm, dtype)
        self.mlp = feed_forward(block.mlp, prepare, together)
        self.mlp_factor = _factor(block.mlp_residual)


def _weight(norm: nn.Module) -> Tensor:
    return cast(Tensor, norm.weight).detach()


def _factor(residual: Residual) -> float:
    return residual.factor * (1.0 if residual.scale is None else residual.scale.item())


def _joined(prepare: Prepare, *layers: Linear) -> Product:
    """Return the joined outputs of layers with the same input, as one product."""
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    weight_FD = torch.cat([_multiplied(layer.scaled()) for layer in layers])
    return prepare(weight_FD, torch.cat(biases) if biases else None)


def _multiplied(part: Scaled) -> Tensor:
    """Return the weight times its multipliers, computed in fp32."""
    if part.is_plain:
        return part.weight.detach()
    return part.each(lambda tensor: tensor.detach().float()).product().to(part.weight.dtype)
