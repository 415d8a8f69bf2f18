"""The one model class: GPT-2, GPT-3, Llama, Qwen3 and MobileLLM shapes are all settings of `ModelConfig`.

Shapes: B batch, T positions in this call, D hidden size, V vocabulary.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightlm.model import fused
from lightlm.model.attention import Attention, Mask, build_mask
from lightlm.model.cache import KVCache, Step
from lightlm.model.config import ModelConfig
from lightlm.model.experts import Experts, keep_padding_uncompiled
from lightlm.model.mlp import build_mlp
from lightlm.model.moe import MoE, Routing
from lightlm.model.norms import build_norm
from lightlm.model.rotary import rotary_table
from lightlm.model.trees import Trees, Trunk


class Block(nn.Module):
    """Pre-norm residual block: attention, then the feed-forward network, dense or of experts."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = MoE(config) if config.has_experts(index) else build_mlp(config)
        self.compiled = False  # in training, by torch.compile

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        cache: KVCache | Trunk | None,
        step: Step | None,
        layer: int,
    ) -> tuple[Tensor, Routing | None]:
        if cache is not None:
            return self._run(x_BTD, rotation, mask, cache, step, layer)
        # Compiled where gradients are wanted alone: else prompts and documents of every length would each be compiled
        # anew. Without the layer's number, which would make each block another function to torch.compile.
        if self.compiled and torch.is_grad_enabled():
            return _compiled_run()(self, x_BTD, rotation, mask)
        return self._run(x_BTD, rotation, mask)

    def _run(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        cache: KVCache | Trunk | None = None,
        step: Step | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, mask, cache, step, layer)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(self.mlp_norm(x_BTD))
            return x_BTD + y_BTD, routing
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), None


@functools.cache
def _compiled_run() -> Callable[..., tuple[Tensor, Routing | None]]:
    """One for all blocks, and not kept in them: a copy of a model would call its original's."""
    keep_padding_uncompiled()
    return torch.compile(Block._run)


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: the shape; `vocab_size` must be set.

    Raises:
        ValueError: the configuration is not a model; the message lists every reason.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config = config.resolved()
        if not config.vocab_size:
            raise ValueError("vocab_size: must be set to build a model")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.recompute_blocks = False  # activation checkpointing (arXiv 1604.06174), where gradients are wanted
        self.norm = build_norm(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights of `init_std`, zero biases, unit norms.

        The two projections that write to the residual stream are scaled by 1/sqrt(2 x depth), so that the
        stream's variance does not grow with depth (GPT-2 paper, section 2.3); learned positions get half the
        standard deviation of tokens (0.01 beside 0.02 in OpenAI's gpt-2 code).
        """
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim < 2:
                parameter.fill_(1.0)
            elif name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.depth))
            else:
                parameter.normal_(0.0, std / 2 if name.startswith("embed_positions") else std)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) weight of the output head."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def compile_blocks(self) -> None:
        """Let torch.compile work on each block alone: all share one graph, so it is done once."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = True

    def new_cache(self, batch_size: int, max_len: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_len` positions (default and limit: max_seq_len)."""
        max_len = min(max_len or self.config.max_seq_len, self.config.max_seq_len)
        return KVCache(self.config, batch_size, max_len, device=self.device, dtype=self._compute_dtype())

    def _compute_dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.embed_tokens.weight.dtype

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None, counts: list[int] | None = None) -> Tensor:
        """Logits (B, T, V) of the next token after each column; see `hidden_states` for the arguments."""
        return self.head(self.hidden_states(tokens_BT, cache, counts))

    def head(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.head_weight)

    def hidden_states(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None = None,
        counts: list[int] | None = None,
        routings: list[Routing] | None = None,
        trees: Trees | None = None,
    ) -> Tensor:
        """The final norm's output (B, T, D), from which `head` makes logits.

        Args:
            tokens_BT: token ids. Without a cache, column t is position t; with one, row b goes on where its
                last chunk ended.
            cache: keys and values of what came before; this call appends to it.
            counts: with a cache, how many columns of each row are tokens; the rest is padding on the right,
                is not stored, and its output means nothing. Default: all.
            routings: a list that gets what each layer of experts did, where gradients are wanted.
            trees: the form of rows that are trees; without a cache.

        Raises:
            ValueError: more positions than max_seq_len or than the cache holds, or counts without a cache.
        """
        batch, length = tokens_BT.shape
        windows = {self.config.window(layer) for layer in range(self.config.depth)}
        if trees is not None:
            if cache is not None:
                raise ValueError("trees keep no cache; what comes before them is their trunk")
            masks = {window: Mask(trees.bias(window, self._compute_dtype()), is_causal=False) for window in windows}
            return self._run_blocks(tokens_BT, trees.positions_BT, masks, trees.trunk, None, None)
        if cache is None:
            if counts is not None:
                raise ValueError("counts go with a cache: without one, padding on the right needs no mask")
            if length > self.config.max_seq_len:
                raise ValueError(f"{length} positions given, max_seq_len is {self.config.max_seq_len}")
            step, num_keys = None, length
            positions_BT = torch.arange(length, device=tokens_BT.device)[None]
            fresh = aligned = True
        else:
            step = cache.begin(batch, length, counts)
            positions_BT, num_keys = step.positions_BT, step.end
            aligned = step.rows is None
            fresh = aligned and step.starts[0] == 0
        masks = {window: build_mask(positions_BT, num_keys, window, fresh=fresh, aligned=aligned) for window in windows}
        x_BTD = self._run_blocks(tokens_BT, positions_BT, masks, cache, step, routings)
        if cache is not None and step is not None:
            cache.commit(step)
        return x_BTD

    def _run_blocks(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        masks: dict[int, Mask],
        cache: KVCache | Trunk | None,
        step: Step | None,
        routings: list[Routing] | None,
    ) -> Tensor:
        """From tokens to the final norm's output; `masks` has one for each window."""
        config = self.config
        # With a tied head the table's gradient is dense anyway: a sparse part is added to it in place, where a dense
        # one would be another (V, D) tensor of zeros and a sum of the two.
        sparse = config.tie_embeddings and fused.applies(self.embed_tokens.weight)
        x_BTD = F.embedding(tokens_BT, self.embed_tokens.weight, sparse=sparse)
        rotation = None
        if config.position == "learned":
            x_BTD = x_BTD + self.embed_positions(positions_BT)
        else:
            cos, sin = rotary_table(positions_BT, config.head_dim, config.rope_theta)
            rotation = cos[:, None], sin[:, None]
        for layer in range(config.depth):
            block = self.blocks[layer // config.layer_sharing]
            arguments = x_BTD, rotation, masks[config.window(layer)], cache, step, layer
            if self.recompute_blocks and torch.is_grad_enabled():
                x_BTD, routing = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTD, routing = block(*arguments)
            if routings is not None and routing is not None:
                routings.append(routing)
        return self.norm(x_BTD)

    def num_parameters(self) -> dict[str, int]:
        """Parameter counts: `total` (a tied head counts once), those `active` for a token (all but the experts it is
        not sent to), and the total's part in `embedding` tables and head."""
        tables = ("embed_tokens.", "embed_positions.", "lm_head.")
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        total = sum(sizes.values())
        return {
            "total": total,
            "active": total - self._idle_parameters(),
            "embedding": sum(size for name, size in sizes.items() if name.startswith(tables)),
        }

    def _idle_parameters(self) -> int:
        """Parameters of the experts that a token is not sent to."""
        experts = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters())
        config = self.config
        return experts // config.num_experts * (config.num_experts - config.num_experts_per_tok) if experts else 0

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward floating-point operations a token: 6 an active weight, and attention's 12 K H S
        a layer over S visible positions, without a discount for causality (arXiv 2204.02311, appendix B)."""
        config = self.config
        block_weights = sum(p.numel() for p in self.blocks.parameters()) - self._idle_parameters()
        visible = sum(min(config.window(layer) or seq_len, seq_len) for layer in range(config.depth))
        return (
            6 * (block_weights * config.layer_sharing + self.head_weight.numel())
            + 12 * config.num_heads * config.head_dim * visible
        )
