"""The one model class: GPT-2, GPT-3, Llama, Qwen3 and MobileLLM shapes are all settings of `ModelConfig`.

Shapes: B batch, T positions in this call, D hidden size, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightlm.model import fused
from lightlm.model.attention import KeysAndValues, Mask, build_attention, build_document_mask, build_mask
from lightlm.model.config import ModelConfig
from lightlm.model.decoding.cache import KVCache, Step
from lightlm.model.decoding.trees import Trees
from lightlm.model.dropout import BranchDropout, Dropout, drop
from lightlm.model.experts import Experts, compute_dtype, keep_padding_uncompiled
from lightlm.model.mlp import build_mlp
from lightlm.model.moe import MoE, Routing
from lightlm.model.norms import build_norm
from lightlm.model.rotary import rotary_table


class Residual(nn.Module):
    """Add a branch to the residual stream, times its learnable scale and the factor of CompleteP (arXiv 2505.01618)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.factor = config.depth_factor
        # One element and not a scalar, which FSDP2 cannot shard.
        self.scale = None if config.residual_scale is None else nn.Parameter(torch.ones(1))

    def forward(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        """Return x + factor * scale * branch."""
        if self.scale is None:
            return x_BTD + branch_BTD if self.factor == 1 else torch.add(x_BTD, branch_BTD, alpha=self.factor)
        if fused.applies(x_BTD):
            return fused.ScaledSumFunction.apply(x_BTD, branch_BTD, self.scale * self.factor)
        return x_BTD + branch_BTD * (self.scale * self.factor)


class Block(nn.Module):
    """A pre-norm residual block: attention, then a dense feed-forward network or a mixture of experts."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = build_attention(config)
        self.attention_residual = Residual(config)
        self.mlp_norm = build_norm(config)
        self.mlp = MoE(config) if config.has_experts(index) else build_mlp(config)
        self.mlp_residual = Residual(config)
        self.compiled = False  # whether torch.compile runs it in training

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        extend: KeysAndValues | None = None,
        dropout: BranchDropout | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Return the output (B, T, D), and what the router did where there is one and gradients are wanted."""
        # Compiled only for training: each length of a prompt or document would be compiled anew. `extend` is left out:
        # it is bound to a layer, so torch.compile would treat each block as another function.
        if self.compiled and extend is None and torch.is_grad_enabled():
            return _compiled_run()(self, x_BTD, rotation, mask, None, dropout)
        return self._run(x_BTD, rotation, mask, extend, dropout)

    def _run(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        extend: KeysAndValues | None,
        dropout: BranchDropout | None,
    ) -> tuple[Tensor, Routing | None]:
        routing = None
        y_BTD = self.attention(self.attention_norm(x_BTD), rotation, mask, extend)
        if dropout is not None:
            y_BTD = drop(y_BTD, dropout.keys_2BT[0], dropout.rate)
        x_BTD = self.attention_residual(x_BTD, y_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(self.mlp_norm(x_BTD))
        else:
            y_BTD = self.mlp(self.mlp_norm(x_BTD))
        if dropout is not None:
            y_BTD = drop(y_BTD, dropout.keys_2BT[1], dropout.rate)
        return self.mlp_residual(x_BTD, y_BTD), routing


@functools.cache
def _compiled_run() -> Callable[..., tuple[Tensor, Routing | None]]:
    """Return the compiled `Block._run`. All blocks share it; one kept in a block would break copies of a model."""
    keep_padding_uncompiled()
    return torch.compile(Block._run)


class MTPHead(nn.Module):
    """Multi-token prediction, one token further (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    It turns the states of the model, or of the head before it, and the embeddings of the next tokens into states.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.state_norm, self.embedding_norm = build_norm(config), build_norm(config)
        self.merge = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, index)
        self.norm = build_norm(config)

    def forward(
        self,
        state_BTD: Tensor,
        embedding_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        dropout: BranchDropout | None = None,
        extend: KeysAndValues | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Return the states (B, T, D), normalized, and what the block's router did; see `Block.forward`."""
        joined_BTX = torch.cat([self.state_norm(state_BTD), self.embedding_norm(embedding_BTD)], -1)
        x_BTD = self.merge(joined_BTX).to(embedding_BTD.dtype)  # the stream is fp32 under autocast, as in the model
        x_BTD, routing = self.block(x_BTD, rotation, mask, extend, dropout)
        return self.norm(x_BTD), routing


class _Columns(NamedTuple):
    """Where the columns of a call are, and what they see.

    Args:
        masks: by window.
        extend: returns a layer's keys and values with the earlier ones before them; None where there are none.
        step: what the cache stores once all layers have run.
    """

    positions_BT: Tensor
    masks: dict[int, Mask]
    extend: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    step: Step | None = None


class Transformer(nn.Module):
    """A decoder-only language model of the shape `config`, with its `vocab_size` set.

    Args:
        mtp_depth: heads of multi-token prediction, which only training has.

    Raises:
        ValueError: the configuration is not a model; the message lists every reason.
    """

    def __init__(self, config: ModelConfig, mtp_depth: int = 0) -> None:
        super().__init__()
        self.config = config = config.resolved()
        if not config.vocab_size:
            raise ValueError("vocab_size: must be set to build a model")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.recompute_blocks = False  # activation checkpointing (arXiv 1604.06174), where gradients are wanted
        self.decoding_precision: str | None = None  # see `round_decoding_to`
        self.norm = build_norm(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialize(self)
        # Last, so that the rest has the same initial weights with and without heads.
        self.mtp = nn.ModuleList(MTPHead(config, config.num_layers + index) for index in range(mtp_depth))
        self._initialize(self.mtp)

    @torch.no_grad()
    def _initialize(self, part: nn.Module) -> None:
        """Draw normal weights of standard deviation `init_std`; set biases to 0, norm weights and multipliers to 1.

        The two projections that write to the residual stream are scaled by 1/sqrt(2 x depth), so that the stream's
        variance does not grow with depth (GPT-2 paper, section 2.3). With `base_depth` that is the depth, and the
        branches' factor does the rest. Learned positions get half the standard deviation of tokens (0.01 against 0.02
        in OpenAI's gpt-2 code).
        """
        config, std = self.config, self.config.init_std
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("residual.scale") and config.residual_scale is not None:
                parameter.fill_(config.residual_scale)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(config.qk_gain)
            elif parameter.ndim < 2 or name.endswith("multipliers"):
                parameter.fill_(1.0)
            elif name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
                parameter.normal_(0.0, std / math.sqrt(2 * (config.base_depth or config.depth)))
            else:
                parameter.normal_(0.0, std / 2 if name.startswith("embed_positions") else std)

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) weight of the output head."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def eps_factor(self) -> float:
        """The factor on AdamW's eps: gradients of the blocks shrink with CompleteP's factor on their branches."""
        return self.config.depth_factor

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embed_tokens.weight.device

    def compile_blocks(self) -> None:
        """Run each block through torch.compile in training. All blocks share one graph, so it is compiled once."""
        for block in self.modules():
            if isinstance(block, Block):
                block.compiled = True

    def round_decoding_to(self, precision: str | None) -> None:
        """Let `lightlm.generate.batch` compute with copies of the weights rounded to "int8"; None keeps them as is.

        The module's own forward pass is not changed.
        """
        self.decoding_precision = precision

    def new_cache(self, batch_size: int, max_len: int | None = None) -> KVCache:
        """Return an empty cache for `batch_size` rows of up to `max_len` positions (default and limit: max_seq_len)."""
        max_len = min(self.config.max_seq_len if max_len is None else max_len, self.config.max_seq_len)
        dtype = compute_dtype(self.embed_tokens.weight)
        return KVCache(self.config, batch_size, max_len, device=self.device, dtype=dtype)

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None, counts: list[int] | None = None) -> Tensor:
        """Return the logits (B, T, V) of each column's next token; see `hidden_states` for arguments and errors."""
        return self.head(self.hidden_states(tokens_BT, cache, counts))

    def head(self, x_BTD: Tensor) -> Tensor:
        """Return the logits (B, T, V) of final hidden states (B, T, D)."""
        return F.linear(x_BTD, self.head_weight)

    def hidden_states(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None = None,
        counts: list[int] | None = None,
        routings: list[Routing] | None = None,
        trees: Trees | None = None,
        dropout: Dropout | None = None,
        offsets_BT: Tensor | None = None,
        mtp_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the final norm's output (B, T, D), from which `head` makes logits.

        Args:
            tokens_BT: token ids. Without a cache, column t is position t. With one, row b continues where its last
                chunk ended.
            cache: keys and values of earlier positions; this call appends to it.
            counts: with a cache, how many columns of each row are tokens (default: all). The rest is padding on the
                right: it is not stored, and its output is meaningless.
            routings: a list to which each layer of experts appends what its router did, where gradients are wanted.
            trees: the form of rows that are trees; without a cache.
            dropout: that of a training pass.
            offsets_BT: keeps attention inside documents (see `offsets_in_documents`), and begins learned positions anew
                in each; for rows without a cache that are not trees. Rotary positions run on: only distances matter.
            mtp_states: a list to which each head of multi-token prediction appends its states (B, T, D), for rows
                without a cache that are not trees. Column t of head k, counted from 1, predicts the token k + 1 columns
                on; the last k columns are meaningless, since the tokens that they need are not there.

        Raises:
            ValueError: there are more positions than max_seq_len or than the cache holds, counts without a cache, or
                trees with one.
        """
        config = self.config
        layers = config.depth + (0 if mtp_states is None else len(self.mtp))
        windows = {config.window(layer) for layer in range(layers)}
        positions_BT, masks, extend, step = self._place(tokens_BT, windows, cache, counts, trees, offsets_BT)
        x_BTD, rotation = self._embed(tokens_BT, positions_BT, offsets_BT)
        branches: list[BranchDropout | None] = [None] * layers
        if dropout is not None:
            x_BTD = dropout.embeddings(x_BTD)
            branches[:] = dropout.branches(layers, tokens_BT.shape[1])
        embedding_BTD = x_BTD
        for layer in range(config.depth):
            block = self.blocks[layer // config.layer_sharing]
            extend_layer = functools.partial(extend, layer) if extend is not None else None
            arguments = x_BTD, rotation, masks[config.window(layer)], extend_layer, branches[layer]
            x_BTD = self._run(block, arguments, routings)
        if cache is not None and step is not None:
            cache.commit(step)
        x_BTD = state_BTD = self.norm(x_BTD)
        for number, (head, layer) in enumerate(zip(self.mtp, range(config.depth, layers), strict=False), 1):
            assert mtp_states is not None
            last = embedding_BTD[:, -1:].expand(-1, number, -1)
            ahead_BTD = torch.cat([embedding_BTD[:, number:], last], 1)
            state_BTD = self._run(
                head, (state_BTD, ahead_BTD, rotation, masks[config.window(layer)], branches[layer]), routings
            )
            mtp_states.append(state_BTD)
        return x_BTD

    def _place(
        self,
        tokens_BT: Tensor,
        windows: set[int],
        cache: KVCache | None,
        counts: list[int] | None,
        trees: Trees | None,
        offsets_BT: Tensor | None,
    ) -> _Columns:
        """Return where the columns are and what they see; see `hidden_states` for arguments and errors."""
        batch, length = tokens_BT.shape
        if trees is not None:
            if cache is not None:
                raise ValueError("trees take no cache; pass what comes before them as their shared prefix")
            dtype = compute_dtype(self.embed_tokens.weight)
            masks = {window: Mask(trees.bias(window, dtype), is_causal=False) for window in windows}
            return _Columns(trees.positions_BT, masks, trees.prepend)
        if cache is not None:
            step = cache.begin(batch, length, counts)
            aligned = step.places is None
            fresh = aligned and step.starts[0] == 0
            masks = {w: build_mask(step.positions_BT, step.end, w, fresh=fresh, aligned=aligned) for w in windows}
            return _Columns(step.positions_BT, masks, functools.partial(cache.update, step), step)
        if counts is not None:
            raise ValueError("counts need a cache: without one, padding on the right needs no mask")
        if length > self.config.max_seq_len:
            raise ValueError(f"{length} positions given, max_seq_len is {self.config.max_seq_len}")
        positions_BT = torch.arange(length, device=tokens_BT.device)[None]
        if offsets_BT is None:
            masks = {w: build_mask(positions_BT, length, w, fresh=True, aligned=True) for w in windows}
        else:
            masks = self._document_masks(offsets_BT, windows)
        return _Columns(positions_BT, masks)

    def _embed(
        self, tokens_BT: Tensor, positions_BT: Tensor, offsets_BT: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the embeddings (B, T, D), with learned positions where the model has them, else the rotation."""
        config = self.config
        # With a tied head the table's gradient is dense anyway. A sparse part is added to it in place; a dense part
        # would be another (V, D) tensor of zeros and a sum of the two.
        sparse = config.tie_embeddings and fused.applies(self.embed_tokens.weight)
        x_BTD = F.embedding(tokens_BT, self.embed_tokens.weight, sparse=sparse)
        if config.embedding_scale != 1:
            x_BTD = x_BTD * config.embedding_scale
        if config.position == "learned":
            return x_BTD + self.embed_positions(positions_BT if offsets_BT is None else offsets_BT), None
        cos, sin = rotary_table(positions_BT, config)
        return x_BTD, (cos[:, None], sin[:, None])

    def _run(self, part: nn.Module, arguments: tuple[Any, ...], routings: list[Routing] | None) -> Tensor:
        """Run a block or a head; append what its router did."""
        if self.recompute_blocks and torch.is_grad_enabled():
            x_BTD, routing = checkpoint(part, *arguments, use_reentrant=False)
        else:
            x_BTD, routing = part(*arguments)
        if routings is not None and routing is not None:
            routings.append(routing)
        output: Tensor = x_BTD
        return output

    def _document_masks(self, offsets_BT: Tensor, windows: set[int]) -> dict[int, Mask]:
        """Return the mask of each window."""
        compiled = torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(block.compiled for block in self.blocks.children())
        )
        dtype, head_dim = compute_dtype(self.embed_tokens.weight), self.config.head_dim
        return {
            window: build_document_mask(offsets_BT, window, dtype=dtype, head_dim=head_dim, compiled=compiled)
            for window in windows
        }

    def num_parameters(self) -> dict[str, int]:
        """Return parameter counts, without the heads of multi-token prediction.

        `total` counts a tied head once, `active` leaves out the experts that a token is not sent to, and `embedding`
        is the part of the total in embedding tables and head.
        """
        tables = ("embed_tokens.", "embed_positions.", "lm_head.")
        total = sum(parameter.numel() for parameter in self.parameters()) - self.mtp_parameters
        embedding = sum(p.numel() for name, p in self.named_parameters() if name.startswith(tables))
        return {"total": total, "active": total - self._idle_parameters(self.blocks), "embedding": embedding}

    @property
    def mtp_parameters(self) -> int:
        """The parameters of the heads of multi-token prediction."""
        return sum(parameter.numel() for parameter in self.mtp.parameters())

    def _idle_parameters(self, part: nn.Module) -> int:
        """Return the parameters of the experts in a part of the model that a token is not sent to."""
        experts = sum(p.numel() for m in part.modules() if isinstance(m, Experts) for p in m.parameters())
        config = self.config
        return experts // config.num_experts * (config.num_experts - config.num_experts_per_tok) if experts else 0

    def flops_per_token(self, seq_len: int) -> int:
        """Return the forward and backward floating-point operations per token (arXiv 2204.02311, appendix B).

        They are 6 per active weight and 6 (K + V) H S per layer for attention over S visible positions, where K and V
        are the widths of a key and a value head, without a discount for causality. Heads of multi-token prediction
        count, each with the output head.
        """
        config, depth = self.config, len(self.mtp)
        block_weights = sum(p.numel() for p in self.blocks.parameters()) - self._idle_parameters(self.blocks)
        mtp_weights = self.mtp_parameters - self._idle_parameters(self.mtp)
        visible = sum(min(config.window(layer) or seq_len, seq_len) for layer in range(config.depth + depth))
        return (
            6 * (block_weights * config.layer_sharing + mtp_weights + (1 + depth) * self.head_weight.numel())
            + 6 * config.num_heads * (config.head_dim + config.value_dim) * visible
        )
