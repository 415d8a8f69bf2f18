"""A model's forward pass for decoding, in few operations.

With one token per row, a step takes the time of reading the weights, and what every operation costs beside its
arithmetic. `FastForward` computes what `Transformer.forward` computes with a cache, from a table of weights that it
prepares once: layers that share an input are one product, learned scales are multiplied in, and keys and values are
written together. The residual stream is fp32. tests/generate/step/test_fast.py holds it to the plain forward pass.

Shapes: B rows, T positions, N = B T tokens, D hidden size, H query heads, G key/value heads, R = H / G queries that
share a key, K head size, C = H K channels, F intermediate size, S cache slots, V vocabulary, E experts, X choices.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlm.model.attention import Attention, Mask, attend, build_mask
from lightlm.model.config import ModelConfig
from lightlm.model.decoding.cache import KVCache, Step
from lightlm.model.mlp import MLP, SwiGLU
from lightlm.model.moe import MoE
from lightlm.model.norms import RMSNorm
from lightlm.model.products import Product, prepared, quantized
from lightlm.model.rotary import rotary_table
from lightlm.model.scaling import Linear, Scaled
from lightlm.model.transformer import Block, Residual, Transformer

Prepare = Callable[[Tensor, Tensor | None], Product]  # turns a weight and its bias into a product
_Rotation = tuple[Tensor, Tensor] | None  # cosines and signed sines, each (N, 1, K)

# What turns weights into products, and the precision of its input; None is the model's.
_PREPARE: dict[str | None, tuple[Prepare, torch.dtype | None]] = {
    None: (prepared, None),
    "int8": (quantized, torch.bfloat16),
}

_TOGETHER_ROWS = 32  # above so many tokens, each expert gets enough of them for products of its own

_forwards: weakref.WeakKeyDictionary[Transformer, "FastForward"] = weakref.WeakKeyDictionary()


def forward_of(model: Transformer) -> "FastForward | Transformer":
    """Return what computes a model the fastest: on a CPU or with rounded weights a `FastForward`, else the model.

    Making one takes as long as copying the weights. It is kept for the next call, unless weights change, and lives as
    long as the model.
    """
    quantize = model.decoding_precision
    if quantize is None and (model.device.type != "cpu" or torch.is_autocast_enabled("cpu")):
        return model
    forward = _forwards.get(model)
    if forward is None or not forward.is_current(model, quantize):
        forward = _forwards[model] = FastForward(model, quantize)
    return forward


class FastForward:
    """A model's forward pass with a cache. It holds prepared copies of the weights, which must not change.

    Args:
        model: in evaluation mode.
        quantize: "int8" rounds matrices and head (`products.quantized`); the token table and routers stay as they are.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, quantize: str | None = None) -> None:
        self._made_from = _fingerprint(model), quantize
        self._config = config = model.config
        prepare, dtype = _PREPARE[quantize]
        self._dtype = dtype or model.embed_tokens.weight.dtype
        self._table_VD = model.embed_tokens.weight.detach()
        self._positions_SD = model.embed_positions.weight.detach() if config.position == "learned" else None
        blocks = [
            (
                _norm(block.attention_norm, self._dtype),
                _Attention(block.attention, config, prepare),
                _factor(block.attention_residual),
                _norm(block.mlp_norm, self._dtype),
                _feed_forward(block.mlp, prepare),
                _factor(block.mlp_residual),
            )
            for block in cast(Iterable[Block], model.blocks)
        ]
        self._layers = [(blocks[layer // config.layer_sharing], config.window(layer)) for layer in range(config.depth)]
        self._norm = _norm(model.norm, self._dtype)
        self._head = prepare(model.head_weight.detach(), None)

    def is_current(self, model: Transformer, quantize: str | None) -> bool:
        """Return whether the model's weights are those that this was made from, in the same way."""
        return self._made_from == (_fingerprint(model), quantize)

    def __call__(self, tokens_BT: Tensor, cache: KVCache, counts: list[int] | None = None) -> Tensor:
        """Return the logits (B, T, V), as `Transformer.forward`."""
        return self.head(self.hidden_states(tokens_BT, cache, counts))

    @torch.no_grad()
    def head(self, x_BTD: Tensor) -> Tensor:
        """Return the logits (..., V) of final hidden states (..., D), in fp32, whose argmax takes a fifth of bf16's."""
        return self._head(x_BTD.flatten(0, -2)).float().unflatten(0, x_BTD.shape[:-1])

    @torch.no_grad()
    def hidden_states(self, tokens_BT: Tensor, cache: KVCache, counts: list[int] | None = None) -> Tensor:
        """Return the final norm's output (B, T, D). Arguments and errors are those of `Transformer.hidden_states`."""
        batch, length = tokens_BT.shape
        step = cache.begin(batch, length, counts)
        masks = self._masks(step, length, cache.pairs.dtype)
        x_ND = F.embedding(tokens_BT.flatten(), self._table_VD).float()
        if self._config.embedding_scale != 1:
            x_ND *= self._config.embedding_scale
        rotation = None
        if self._positions_SD is not None:
            x_ND += F.embedding(step.positions_BT.flatten(), self._positions_SD)
        else:
            rotation = self._rotation(step.positions_BT.flatten())
        # Views of all layers at once: one call instead of one for each.
        places: Sequence[Tensor] = ()
        if length == 1 and step.places is None:
            places = cache.pairs[:, :, :, :, step.starts[0]].unbind(0)
        pairs, keys, values = (
            part.unbind(0) for part in (cache.pairs, cache.keys[:, :, :, : step.end], cache.values[:, :, :, : step.end])
        )
        for layer, (block, window) in enumerate(self._layers):
            norm, attention, factor, mlp_norm, mlp, mlp_factor = block
            q_NHK, new_N2GK, gate_NC = attention.project(norm(x_ND), rotation)
            if places:
                places[layer].copy_(new_N2GK)
            else:
                _store(pairs[layer], new_N2GK.unflatten(0, (batch, length)), step)
            y_ND = attention.attend(q_NHK, keys[layer], values[layer], masks[window], gate_NC)
            x_ND.add_(y_ND, alpha=factor)
            x_ND.add_(mlp(mlp_norm(x_ND)), alpha=mlp_factor)
        cache.commit(step)
        return self._norm(x_ND).unflatten(0, (batch, length))

    def _masks(self, step: Step, length: int, dtype: torch.dtype) -> dict[int, Mask]:
        """Return the mask of each window, as numbers that are added to the scores."""
        aligned = step.places is None
        fresh = aligned and step.starts[0] == 0
        masks = {}
        for window in {window for _, window in self._layers}:
            mask = build_mask(step.positions_BT, step.end, window, fresh=fresh, aligned=aligned)
            if mask.allowed is not None:
                bias = torch.zeros(mask.allowed.shape, dtype=dtype, device=mask.allowed.device)
                mask = Mask(bias.masked_fill_(~mask.allowed, -torch.inf))
            masks[window] = mask
        return masks

    def _rotation(self, positions_N: Tensor) -> _Rotation:
        """Return cosines and sines (N, 1, K); rotated halves are (-second, first), and the sine has the sign."""
        cos_N1K, sin_N1K = rotary_table(positions_N[:, None], self._config)
        sin_N1K[..., : self._config.head_dim // 2].neg_()
        return cos_N1K.to(self._dtype), sin_N1K.to(self._dtype)


def _store(pairs_B2GSK: Tensor, new_BT2GK: Tensor, step: Step) -> None:
    """Write the keys and values of a chunk into a layer's cache."""
    if step.places is None:
        pairs_B2GSK[:, :, :, step.starts[0] : step.end] = new_BT2GK.permute(0, 2, 3, 1, 4)
    else:
        rows, slots, columns = step.places
        # Two index tensors around slices put the indexed pairs first: (pairs, 2, G, K).
        pairs_B2GSK[rows, :, :, slots] = new_BT2GK[rows, columns].to(pairs_B2GSK.dtype)


class _Attention:
    """Attention of one layer, with joined projections."""

    def __init__(self, attention: Attention, config: ModelConfig, prepare: Prepare) -> None:
        self._sizes = [config.num_heads, 2 * config.num_kv_heads]
        self._groups, self._half, self._eps = config.num_kv_heads, config.head_dim // 2, config.norm_eps
        self._rotated = config.num_heads + config.num_kv_heads
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        if attention.gate_proj is not None:
            layers.append(attention.gate_proj)
            self._sizes.append(config.num_heads)
        self._project, self._output = _joined(prepare, *layers), _joined(prepare, attention.o_proj)
        self._norm_HK: Tensor | None = None
        if config.qk_norm:
            norms = ((attention.q_norm, config.num_heads), (attention.k_norm, config.num_kv_heads))
            self._norm_HK = torch.cat([_weight(norm).expand(count, -1) for norm, count in norms])

    def project(self, x_ND: Tensor, rotation: _Rotation) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries (N, H, K), keys beside values (N, 2, G, K), and gates (N, C) if there are any."""
        heads_NHK = self._project(x_ND).view(len(x_ND), sum(self._sizes), -1)
        turned_NHK = heads_NHK[:, : self._rotated]
        if self._norm_HK is not None:
            turned_NHK.copy_(F.rms_norm(turned_NHK, turned_NHK.shape[-1:], None, self._eps) * self._norm_HK)
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
        return self._output(y_NC if gate_NC is None else y_NC * gate_NC.sigmoid())

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


class _SwiGLU:
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, both: Product, down: Product) -> None:
        self._both, self._down = both, down

    def __call__(self, x_ND: Tensor) -> Tensor:
        gate_NF, up_NF = self._both(x_ND).chunk(2, -1)
        return self._down(F.silu(gate_NF).mul_(up_NF))


class _MLP:
    """down(act(up(x)))."""

    def __init__(self, mlp: MLP, prepare: Prepare) -> None:
        self._up, self._down = _joined(prepare, mlp.up_proj), _joined(prepare, mlp.down_proj)
        self._activate = mlp.activate

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self._down(self._activate(self._up(x_ND)))


class _MoE:
    """A mixture of experts. One token reads the weights of its experts only.

    Some tokens choose most of the experts between them: then all experts are one network, whose hidden features count
    as much as the router says. That is two products in place of two for each expert.
    """

    def __init__(self, moe: MoE, prepare: Prepare) -> None:
        self._router = moe.router
        self._shared = None if moe.shared is None else _feed_forward(moe.shared, prepare)
        gate_EFD, up_EFD, down_EDF = (_multiplied(part) for part in moe.experts.scaled())
        self._num_experts = len(gate_EFD)
        self._both = [prepare(torch.cat(pair), None) for pair in zip(gate_EFD, up_EFD, strict=True)]
        self._down = [prepare(down_DF, None) for down_DF in down_EDF]
        self._all_both = prepare(torch.cat((gate_EFD, up_EFD)).flatten(0, 1), None)
        self._all_down = prepare(down_EDF.transpose(0, 1).flatten(1), None)

    def __call__(self, x_ND: Tensor) -> Tensor:
        ids_NX, weights_NX, _, _ = self._router(x_ND)
        if len(x_ND) == 1:
            y_ND = self._one(x_ND, ids_NX[0].tolist(), weights_NX[0])
        elif len(x_ND) <= _TOGETHER_ROWS and ids_NX.numel() >= self._num_experts:
            y_ND = self._together(x_ND, ids_NX, weights_NX)
        else:
            y_ND = self._apart(x_ND, ids_NX, weights_NX)
        return y_ND if self._shared is None else y_ND.add_(self._shared(x_ND))

    def _one(self, x_1D: Tensor, experts: list[int], weights_X: Tensor) -> Tensor:
        gate_XF, up_XF = torch.cat([self._both[expert](x_1D) for expert in experts]).chunk(2, -1)
        h_XF = F.silu(gate_XF).mul_(up_XF).mul_(weights_X[:, None])
        parts = [self._down[expert](h_1F) for expert, h_1F in zip(experts, h_XF.split(1), strict=True)]
        return torch.stack(parts).sum(0)

    def _together(self, x_ND: Tensor, ids_NX: Tensor, weights_NX: Tensor) -> Tensor:
        gate_NC, up_NC = self._all_both(x_ND).chunk(2, -1)
        weights_NE = weights_NX.new_zeros(len(x_ND), self._num_experts).scatter_(1, ids_NX, weights_NX)
        h_NEF = F.silu(gate_NC).mul_(up_NC).view(len(x_ND), self._num_experts, -1)
        return self._all_down(h_NEF.mul_(weights_NE[..., None]).flatten(1))

    def _apart(self, x_ND: Tensor, ids_NX: Tensor, weights_NX: Tensor) -> Tensor:
        y_ND = torch.zeros_like(x_ND)
        choices = sorted(
            (expert, row, place) for row, ids in enumerate(ids_NX.tolist()) for place, expert in enumerate(ids)
        )
        for expert, chosen in itertools.groupby(choices, key=lambda choice: choice[0]):
            _, rows, places = (torch.tensor(part, device=x_ND.device) for part in zip(*chosen, strict=True))
            gate_NF, up_NF = self._both[expert](x_ND[rows]).chunk(2, -1)
            part_ND = self._down[expert](F.silu(gate_NF).mul_(up_NF)) * weights_NX[rows, places, None]
            y_ND.index_add_(0, rows, part_ND.to(y_ND.dtype))
        return y_ND


def _feed_forward(mlp: nn.Module, prepare: Prepare) -> Callable[[Tensor], Tensor]:
    if isinstance(mlp, MoE):
        return _MoE(mlp, prepare)
    if isinstance(mlp, SwiGLU):
        return _SwiGLU(_joined(prepare, mlp.gate_proj, mlp.up_proj), _joined(prepare, mlp.down_proj))
    assert isinstance(mlp, MLP)
    return _MLP(mlp, prepare)


def _norm(norm: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a norm of fp32 rows (N, D) whose output has the given precision."""
    weight_D = _weight(norm).float()
    cast = dtype != torch.float32
    if isinstance(norm, nn.LayerNorm):
        bias_D = None if norm.bias is None else norm.bias.detach().float()
        return lambda x_ND: F.layer_norm(x_ND, weight_D.shape, weight_D, bias_D, norm.eps).to(dtype)
    assert isinstance(norm, RMSNorm)
    eps, share = torch.tensor(norm.eps, device=weight_D.device), 1 / len(weight_D)
    length = torch.linalg.vector_norm

    def rms_norm(x_ND: Tensor) -> Tensor:
        # In 5 operations; torch's own takes 8 on a CPU.
        length_N1 = length(x_ND, 2, -1, True)
        scale_N1 = torch.addcmul(eps, length_N1, length_N1, value=share).rsqrt_()
        y_ND = (x_ND * scale_N1).mul_(weight_D)
        return y_ND.to(dtype) if cast else y_ND

    return rms_norm


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


def _fingerprint(model: Transformer) -> list[tuple[int, int]]:
    """Return where each tensor of a model lies, and how often it has been changed in place."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
