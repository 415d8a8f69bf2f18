"""One decoding step of a few rows in few operations.

With one token per row, a step takes the time of reading the weights, and what every operation costs beside its
arithmetic. `FastStep` computes what `Transformer.forward` computes with a cache, from a table of weights that it
prepares once: layers that share an input are one product, learned scales are multiplied in, and keys and values are
written together. The residual stream is fp32. tests/generate/step/test_fast.py holds it to the plain forward pass.

Shapes: B rows, D hidden size, H query heads, G key/value heads, R = H / G queries that share a key, K head size,
F intermediate size, S cache slots, V vocabulary, E experts, N rows of an expert.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlm.model.attention import Attention, build_mask
from lightlm.model.config import ModelConfig
from lightlm.model.decoding.cache import KVCache
from lightlm.model.experts import Experts
from lightlm.model.mlp import MLP, SwiGLU
from lightlm.model.moe import MoE
from lightlm.model.norms import RMSNorm
from lightlm.model.products import Product, prepared
from lightlm.model.rotary import rotary_table
from lightlm.model.scaling import Linear, Scaled
from lightlm.model.transformer import Block, Residual, Transformer

_steps: weakref.WeakKeyDictionary[Transformer, "FastStep"] = weakref.WeakKeyDictionary()


def step_of(model: Transformer) -> "FastStep | None":
    """Return the fast step of a model on a CPU: the last one, unless weights have changed since. Else None.

    Making it takes as long as copying the weights. It lives as long as the model.
    """
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    step = _steps.get(model)
    if step is None or not step.is_current(model):
        step = _steps[model] = FastStep(model)
    return step


def _fingerprint(model: Transformer) -> list[tuple[int, int]]:
    """Return where each tensor of a model lies, and how often it has been changed in place."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]


class FastStep:
    """The next logits of a model's rows. It holds prepared copies of the weights, which must not change.

    Args:
        model: in evaluation mode; for other models and after a change of weights, `step_of` makes another step.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer) -> None:
        self._fingerprint = _fingerprint(model)
        self._config = config = model.config
        self._dtype = model.embed_tokens.weight.dtype
        self._table_VD = model.embed_tokens.weight
        self._positions_SD = model.embed_positions.weight if config.position == "learned" else None
        blocks = [
            (
                _norm(block.attention_norm, self._dtype),
                _Attention(block.attention, config),
                _factor(block.attention_residual),
                _norm(block.mlp_norm, self._dtype),
                _feed_forward(block.mlp),
                _factor(block.mlp_residual),
            )
            for block in cast(Iterable[Block], model.blocks)
        ]
        self._layers = [blocks[layer // config.layer_sharing] for layer in range(config.depth)]
        self._windows = [config.window(layer) for layer in range(config.depth)]
        self._norm = _norm(model.norm, self._dtype)
        self._head = prepared(model.head_weight.detach())

    @torch.no_grad()
    def __call__(self, tokens_B1: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, V) after one more token of each row, which the cache then holds.

        Raises:
            ValueError: as `Transformer.hidden_states`.
        """
        config = self._config
        step = cache.begin(len(tokens_B1), 1, None)
        aligned = step.places is None
        biases = {window: self._bias(step.positions_BT, step.end, window, aligned) for window in set(self._windows)}
        x_BD = F.embedding(tokens_B1[:, 0], self._table_VD).float()
        if config.embedding_scale != 1:
            x_BD *= config.embedding_scale
        rotation = None
        if self._positions_SD is not None:
            x_BD += F.embedding(step.positions_BT[:, 0], self._positions_SD)
        else:
            cos_B1K, sin_B1K = rotary_table(step.positions_BT, config.head_dim, config.rope_theta)
            # Rotated halves are (-second, first); the sign is part of the sine.
            sin_B1K[..., : config.head_dim // 2].neg_()
            rotation = cos_B1K.to(self._dtype), sin_B1K.to(self._dtype)
        # Views of all layers at once: one call instead of one per layer.
        places: Sequence[Tensor] = ()
        if aligned:
            places = cache.pairs[:, :, :, :, step.starts[0]].unbind(0)
        keys, values = cache.keys[:, :, :, : step.end].unbind(0), cache.values[:, :, :, : step.end].unbind(0)
        for layer, (norm, attention, factor, mlp_norm, mlp, mlp_factor) in enumerate(self._layers):
            heads = attention.project(norm(x_BD), rotation)
            if aligned:
                places[layer].copy_(heads[1])
            else:
                rows, slots, _ = step.places  # type: ignore[misc]
                cache.pairs[layer, rows, :, :, slots] = heads[1].to(cache.pairs.dtype)
            y_BD = attention.attend(heads[0], keys[layer], values[layer], biases[self._windows[layer]], heads[2])
            x_BD.add_(y_BD, alpha=factor)
            x_BD.add_(mlp(mlp_norm(x_BD)), alpha=mlp_factor)
        cache.commit(step)
        return self._head(self._norm(x_BD))

    def is_current(self, model: Transformer) -> bool:
        """Return whether the model's weights are those that this step was made from."""
        return self._fingerprint == _fingerprint(model)

    def _bias(self, positions_B1: Tensor, num_keys: int, window: int, aligned: bool) -> Tensor | None:
        """Return what is added to the scores (B, 1, 1, S) of a layer; None if every row sees all keys."""
        allowed = build_mask(positions_B1, num_keys, window, fresh=False, aligned=aligned).allowed
        if allowed is None:
            return None
        return torch.zeros(allowed.shape, dtype=self._dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


class _Attention:
    """Attention of one token per row, with joined projections."""

    def __init__(self, attention: Attention, config: ModelConfig) -> None:
        self._sizes = [config.num_heads, 2 * config.num_kv_heads]
        self._groups, self._half, self._eps = config.num_kv_heads, config.head_dim // 2, config.norm_eps
        self._rotated = config.num_heads + config.num_kv_heads
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        if attention.gate_proj is not None:
            layers.append(attention.gate_proj)
            self._sizes.append(config.num_heads)
        self._project, self._output = joined(*layers), joined(attention.o_proj)
        self._norm_HK: Tensor | None = None
        if config.qk_norm:
            norms = ((attention.q_norm, config.num_heads), (attention.k_norm, config.num_kv_heads))
            self._norm_HK = torch.cat([_weight(norm).expand(count, -1) for norm, count in norms])

    def project(self, x_BD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries (B, G, R, K), keys beside values (B, 2, G, K), and gates (B, H K) if there are any."""
        heads_BHK = self._project(x_BD).view(len(x_BD), sum(self._sizes), -1)
        turned_BHK = heads_BHK[:, : self._rotated]
        if self._norm_HK is not None:
            turned_BHK.copy_(F.rms_norm(turned_BHK, turned_BHK.shape[-1:], None, self._eps) * self._norm_HK)
        if rotation is not None:
            halves_BHK = turned_BHK.roll(self._half, -1)
            turned_BHK.mul_(rotation[0]).addcmul_(halves_BHK, rotation[1])
        q_BHK, pairs_BHK, *gates = heads_BHK.split(self._sizes, 1)
        return (
            q_BHK.unflatten(1, (self._groups, -1)),
            pairs_BHK.unflatten(1, (2, self._groups)),
            gates[0].flatten(1) if gates else None,
        )

    def attend(
        self, q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias: Tensor | None, gate_BC: Tensor | None
    ) -> Tensor:
        """Return the output (B, D). Queries that share a key are as many positions of one head."""
        shared = q_BGRK.shape[2]
        if shared == 1 and k_BGSK.dtype == torch.bfloat16:
            # One query is a product of oneDNN that takes 5 times as long as two (AMD EPYC, 150 keys).
            q_BGRK = q_BGRK.expand(-1, -1, 2, -1)
        y_BGRK = F.scaled_dot_product_attention(q_BGRK.to(k_BGSK.dtype), k_BGSK, v_BGSK, attn_mask=bias)
        y_BC = y_BGRK[:, :, :shared].flatten(1)
        return self._output(y_BC if gate_BC is None else y_BC * gate_BC.sigmoid())


class _SwiGLU:
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, both: Product, down: Product) -> None:
        self._both, self._down = both, down

    def __call__(self, x_ND: Tensor) -> Tensor:
        gate_NF, up_NF = self._both(x_ND).chunk(2, -1)
        return self._down(F.silu(gate_NF).mul_(up_NF))


class _MLP:
    """down(act(up(x)))."""

    def __init__(self, mlp: MLP) -> None:
        self._up, self._down, self._activate = joined(mlp.up_proj), joined(mlp.down_proj), mlp._activate

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self._down(self._activate(self._up(x_ND)))


class _Experts:
    """A mixture of experts that reads the weights of chosen experts only."""

    def __init__(self, moe: MoE) -> None:
        self._router = moe.router
        self._shared = None if moe.shared is None else _feed_forward(moe.shared)
        self._experts = [_SwiGLU(*products) for products in expert_products(moe.experts)]

    def __call__(self, x_BD: Tensor) -> Tensor:
        ids_BK, weights_BK, _, _ = self._router(x_BD)
        y_BD = torch.zeros_like(x_BD) if self._shared is None else self._shared(x_BD)
        chosen = sorted(
            (expert, row, place) for row, ids in enumerate(ids_BK.tolist()) for place, expert in enumerate(ids)
        )
        for expert, choices in itertools.groupby(chosen, key=lambda choice: choice[0]):
            _, rows, places = zip(*choices, strict=True)
            if len(x_BD) == 1:
                y_BD += self._experts[expert](x_BD) * weights_BK[0, places[0]]
                continue
            rows_N = torch.tensor(rows, device=x_BD.device)
            weights_N1 = weights_BK[rows_N, torch.tensor(places, device=x_BD.device)][:, None]
            y_BD.index_add_(0, rows_N, (self._experts[expert](x_BD[rows_N]) * weights_N1).to(y_BD.dtype))
        return y_BD


def _feed_forward(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(mlp, MoE):
        return _Experts(mlp)
    if isinstance(mlp, SwiGLU):
        return _SwiGLU(joined(mlp.gate_proj, mlp.up_proj), joined(mlp.down_proj))
    assert isinstance(mlp, MLP)
    return _MLP(mlp)


def _norm(norm: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a norm of fp32 rows (B, D) whose output has the given precision."""
    weight_D = _weight(norm).float()
    if isinstance(norm, nn.LayerNorm):
        bias_D = None if norm.bias is None else norm.bias.detach().float()
        return lambda x_BD: F.layer_norm(x_BD, weight_D.shape, weight_D, bias_D, norm.eps).to(dtype)
    assert isinstance(norm, RMSNorm)
    eps, share = torch.tensor(norm.eps, device=weight_D.device), 1 / len(weight_D)
    length = torch.linalg.vector_norm

    def rms_norm(x_BD: Tensor) -> Tensor:
        # In 5 operations; torch's own takes 8 on a CPU.
        norm_B1 = length(x_BD, 2, -1, True)
        scale_B1 = torch.addcmul(eps, norm_B1, norm_B1, value=share).rsqrt_()
        return (x_BD * scale_B1).mul_(weight_D).to(dtype)

    return rms_norm


def _weight(norm: nn.Module) -> Tensor:
    return cast(Tensor, norm.weight).detach()


def _factor(residual: Residual) -> float:
    return residual.factor * (1.0 if residual.scale is None else residual.scale.item())


def joined(*layers: Linear) -> Product:
    """Return the joined outputs of layers with the same input, as one product."""
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    weight_FD = torch.cat([_multiplied(layer.scaled()) for layer in layers])
    return prepared(weight_FD, torch.cat(biases) if biases else None)


def expert_products(experts: Experts) -> list[tuple[Product, Product]]:
    """Return for each expert gate and up as one product, and down."""
    gate_EFD, up_EFD, down_EDF = (_multiplied(part) for part in experts.scaled())
    return [
        (prepared(torch.cat((gate_EFD[expert], up_EFD[expert]))), prepared(down_EDF[expert]))
        for expert in range(len(gate_EFD))
    ]


def _multiplied(part: Scaled) -> Tensor:
    """Return the weight times its multipliers, computed in fp32."""
    if part.is_plain:
        return part.weight.detach()
    return part.each(lambda tensor: tensor.detach().float()).product().to(part.weight.dtype)
