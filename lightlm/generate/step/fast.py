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
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlm.generate.step.parts import FastBlock, FastNorm, Prepare, Rotation
from lightlm.generate.step.program import MOST_TOKENS, Program, is_available
from lightlm.model.attention import Mask, build_mask
from lightlm.model.decoding.cache import KVCache, Step
from lightlm.model.products import Weights, prepared, quantized, rounded
from lightlm.model.rotary import rotary_table
from lightlm.model.transformer import Block, Transformer

# What turns weights into products without and with compiled code, and the precision of its input; None is the model's.
_PREPARE: dict[tuple[str | None, bool], tuple[Prepare, torch.dtype | None]] = {
    (None, False): (prepared, None),
    (None, True): (Weights, None),
    ("int8", False): (quantized, torch.bfloat16),
    ("int8", True): (rounded, torch.bfloat16),
}

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
        native = is_available(model)
        prepare, dtype = _PREPARE[quantize, native]
        self._dtype = dtype or model.embed_tokens.weight.dtype
        self._table_VD = model.embed_tokens.weight.detach()
        self._positions_SD = model.embed_positions.weight.detach() if config.position == "learned" else None
        blocks = [
            FastBlock(block, config, self._dtype, prepare, together=not native)
            for block in cast(Iterable[Block], model.blocks)
        ]
        self._layers = [(blocks[layer // config.layer_sharing], config.window(layer)) for layer in range(config.depth)]
        self._norm = FastNorm(model.norm, self._dtype)
        self._head = prepare(model.head_weight.detach(), None)
        self._program: Program | None = None
        if native:
            self._program = Program(config, self._layers, self._norm, self._head, self._table_VD, self._positions_SD)

    def is_current(self, model: Transformer, quantize: str | None) -> bool:
        """Return whether the model's weights are those that this was made from, in the same way."""
        return self._made_from == (_fingerprint(model), quantize)

    def __call__(self, tokens_BT: Tensor, cache: KVCache, counts: list[int] | None = None) -> Tensor:
        """Return the logits (B, T, V), as `Transformer.forward`."""
        return self.head(self.hidden_states(tokens_BT, cache, counts))

    @torch.no_grad()
    def head(self, x_BTD: Tensor) -> Tensor:
        """Return the logits (..., V) of final hidden states (..., D), in fp32, whose argmax takes a fifth of bf16's."""
        x_ND = x_BTD.flatten(0, -2)
        if self._program is not None and len(x_ND) <= MOST_TOKENS:
            return self._program.head(x_ND).unflatten(0, x_BTD.shape[:-1])
        return self._head(x_ND.to(self._dtype)).float().unflatten(0, x_BTD.shape[:-1])

    @torch.no_grad()
    def hidden_states(self, tokens_BT: Tensor, cache: KVCache, counts: list[int] | None = None) -> Tensor:
        """Return the final norm's output (B, T, D). Arguments and errors are those of `Transformer.hidden_states`."""
        batch, length = tokens_BT.shape
        step = cache.begin(batch, length, counts)
        if self._program is not None and sum(step.counts) <= MOST_TOKENS:
            x_BTD = self._program.hidden_states(tokens_BT, step, cache.pairs)
            cache.commit(step)
            return x_BTD
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
            q_NHK, new_N2GK, gate_NC = block.attention.project(block.norm(x_ND), rotation)
            if places:
                places[layer].copy_(new_N2GK)
            else:
                _store(pairs[layer], new_N2GK.unflatten(0, (batch, length)), step)
            y_ND = block.attention.attend(q_NHK, keys[layer], values[layer], masks[window], gate_NC)
            x_ND.add_(y_ND, alpha=block.factor)
            x_ND.add_(block.mlp(block.mlp_norm(x_ND)), alpha=block.mlp_factor)
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

    def _rotation(self, positions_N: Tensor) -> Rotation:
        """Return cosines and sines (N, 1, K); rotated halves are (-second, first), and the sine has the sign."""
        cos_N1K, sin_N1K = rotary_table(positions_N[:, None], self._config)
        sin_N1K[..., : self._config.rotary_dim // 2].neg_()
        return cos_N1K.to(self._dtype), sin_N1K.to(self._dtype)


def _store(pairs_B2GSK: Tensor, new_BT2GK: Tensor, step: Step) -> None:
    """Write the keys and values of a chunk into a layer's cache."""
    if step.places is None:
        pairs_B2GSK[:, :, :, step.starts[0] : step.end] = new_BT2GK.permute(0, 2, 3, 1, 4)
    else:
        rows, slots, columns = step.places
        # Two index tensors around slices put the indexed pairs first: (pairs, 2, G, K).
        pairs_B2GSK[rows, :, :, slots] = new_BT2GK[rows, columns].to(pairs_B2GSK.dtype)


def _fingerprint(model: Transformer) -> list[tuple[int, int]]:
    """Return where each tensor of a model lies, and how often it has been changed in place."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
