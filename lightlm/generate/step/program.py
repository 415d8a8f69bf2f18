"""The forward pass of a few tokens as a list of operations, which `native.c` computes.

Shapes: B rows, T positions, N tokens, D hidden size, F features out, H query heads, G key/value heads, K head size,
V vocabulary, E experts, X choices.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightlm.generate.step.native import Call, Matrix, Op, library, num_threads
from lightlm.generate.step.parts import FastAttention, FastBlock, FastMLP, FastMoE, FastNorm, FastSwiGLU
from lightlm.model.config import ModelConfig
from lightlm.model.decoding.cache import Step
from lightlm.model.products import Product, Weights
from lightlm.model.rotary import rotary_frequencies
from lightlm.model.transformer import Transformer

MOST_TOKENS = 32  # above, torch's products are faster

# The numbers of native.c.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_EMBED, _NORM, _LINEAR, _SWIGLU, _HEADS, _ATTEND, _ROUTE = range(7)
_ACTIVATIONS = {"gelu": 1, "relu2": 2, "gelu_erf": 3}
_ROUTERS = {("sigmoid", False): 0, ("softmax", False): 1, ("sigmoid", True): 2, ("softmax", True): 3}
_BLOCK = 4
_SPARE = 256  # numbers that each thread has beyond what is counted


def is_available(model: Transformer) -> bool:
    """Return whether this machine, the model's precision and its kind of attention have compiled code."""
    weight_VD = model.embed_tokens.weight
    if model.config.attention != "gqa":
        return False
    return weight_VD.device.type == "cpu" and weight_VD.dtype in _TYPES and library() is not None


def multiplication(weights: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a function that multiplies one token of ones by each weight (F, D), to measure the time."""
    native, rounds = library(), []
    assert native is not None
    for weight_FD in weights:
        x_1D, y_1F = torch.ones(1, weight_FD.shape[1]), torch.empty(1, len(weight_FD))
        matrix = Matrix(numbers=weight_FD.data_ptr(), type=_TYPES[weight_FD.dtype], rows=len(weight_FD))
        matrix.columns = weight_FD.shape[1]
        op = Op(kind=_LINEAR, matrices=(Matrix * 1)(matrix), factor=1, input=x_1D.data_ptr(), output=y_1F.data_ptr())
        rounds.append((op, weight_FD, x_1D, y_1F))
    widest, threads = max(weight_FD.shape[1] for weight_FD in weights), num_threads()
    ops = (Op * len(rounds))(*(op for op, *_ in rounds))
    size = _BLOCK * (-(-widest // 32) * 32) + widest + _SPARE
    own = torch.empty(threads, size)

    def run() -> list[Tensor]:
        native.run(ops, len(ops), Call(tokens=1, threads=threads, widest=widest, own=own.data_ptr(), own_step=size))
        return [y_1F for *_, y_1F in rounds]

    return run


class Program:
    """The operations of a model, and memory for what they compute. Calls of several threads wait for one another.

    Args:
        layers: the block of each layer, and its window. All products are `Weights`.
        table_VD: token embeddings.
        positions_SD: learned positions, if there are any.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[tuple[FastBlock, int]],
        norm: FastNorm,
        head: Product,
        table_VD: Tensor,
        positions_SD: Tensor | None,
    ) -> None:
        native = library()
        assert native is not None
        self._native, self._config, self._lock = native, config, threading.Lock()
        self._alive: list[Any] = []  # what the operations point to
        choices = config.num_experts_per_tok if config.num_experts else 0
        self._x = self._buffer(config.hidden_size)
        self._final = self._buffer(config.hidden_size)
        heads = config.num_heads * (1 + config.attention_gate) + 2 * config.num_kv_heads
        self._heads = self._buffer(heads * config.head_dim)
        self._y = self._buffer(config.num_heads * config.head_dim)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self._hidden = self._buffer(max(config.intermediate_size, shared))
        self._routed = self._buffer(choices * config.moe_intermediate_size)
        self._frequencies: Tensor | None = None
        if config.position == "rope":
            self._frequencies = rotary_frequencies(config)
        self._ops: list[Op] = []
        tables = [
            self._matrix(Weights(table_VD)),
            Matrix() if positions_SD is None else self._matrix(Weights(positions_SD)),
        ]
        self._add(_EMBED, tables, output=self._x, factor=config.embedding_scale, wait=1)
        for layer, (block, window) in enumerate(layers):
            self._add_block(layer, block, window)
        self._add_norm(norm, output=self._final)
        self._body = (Op * len(self._ops))(*self._ops)
        self._head, self._vocab_size = (Op * 1)(self._linear(head, output=None, input=self._x)), config.vocab_size
        self._widest = max(config.hidden_size, self._y.shape[1], self._hidden.shape[1], config.moe_intermediate_size)
        self._own_size = self._own(MOST_TOKENS * max(choices, 1))

    def _own(self, pairs: int) -> int:
        """Return how many numbers each thread needs for itself, as `own_of` in native.c divides them."""
        config, widest = self._config, -(-self._widest // 32) * 32
        own = MOST_TOKENS * config.hidden_size + _BLOCK * widest + pairs * widest // 2 + (2 * _BLOCK + 3) * pairs
        return own + _SPARE + config.num_experts + max(config.max_seq_len, config.num_experts)

    def hidden_states(self, tokens_BT: Tensor, step: Step, pairs: Tensor) -> Tensor:
        """Return the final norm's output (B, T, D) in fp32; that of padding is 0.

        Args:
            step: from `KVCache.begin`; it has at most `MOST_TOKENS` tokens.
            pairs: the cache, (layers, B, 2, G, slots, K).

        Raises:
            IndexError: a token is not in the table.
        """
        batch, length = tokens_BT.shape
        spans = [(row, start, count) for row, (start, count) in enumerate(zip(step.starts, step.counts, strict=True))]
        rows = [row for row, _, count in spans for _ in range(count)]
        positions = [start + column for _, start, count in spans for column in range(count)]
        full = len(rows) == batch * length
        ids_N = tokens_BT.flatten()
        if not full:
            kept = [row * length + column for row, _, count in spans for column in range(count)]
            kept_N = torch.tensor(kept, dtype=torch.long)
            ids_N = ids_N[kept_N]
        index_3N = torch.stack((ids_N, *torch.tensor([rows, positions], dtype=torch.long)))
        layers, cache_rows, _, groups, _, _ = pairs.stride()
        with self._lock:
            self._run(
                self._body,
                len(rows),
                ids=index_3N[0].data_ptr(),
                rows=index_3N[1].data_ptr(),
                positions=index_3N[2].data_ptr(),
                cache=pairs.data_ptr(),
                cache_type=_TYPES[pairs.dtype],
                layer_step=layers,
                row_step=cache_rows,
                pair_step=pairs.stride(2),
                group_step=groups,
            )
            x_ND = self._final[: len(rows)].clone()
        if not full:
            x_ND = x_ND.new_zeros(batch * length, x_ND.shape[1]).index_copy_(0, kept_N, x_ND)
        return x_ND.view(batch, length, -1)

    def head(self, x_ND: Tensor) -> Tensor:
        """Return the logits (N, V) of at most `MOST_TOKENS` final hidden states, in fp32."""
        x_ND = x_ND.float().contiguous()
        logits_NV = x_ND.new_empty(len(x_ND), self._vocab_size)
        with self._lock:
            self._head[0].input, self._head[0].output = x_ND.data_ptr(), logits_NV.data_ptr()
            self._run(self._head, len(x_ND))
        return logits_NV

    def _run(self, ops: Any, tokens: int, **places: int) -> None:
        config, threads = self._config, num_threads()
        own = torch.empty(threads, self._own_size)
        call = Call(
            tokens=tokens,
            width=config.hidden_size,
            heads=config.num_heads,
            groups=config.num_kv_heads,
            size=config.head_dim,
            gated=config.attention_gate,
            experts=config.num_experts,
            choices=config.num_experts_per_tok if config.num_experts else 0,
            threads=threads,
            own=own.data_ptr(),
            own_step=self._own_size,
            widest=self._widest,
            **places,
        )
        if self._native.run(ops, len(ops), call) != 0:
            raise IndexError(f"a token id is not in the table of {config.vocab_size:,} tokens")

    def _add_block(self, layer: int, block: FastBlock, window: int) -> None:
        attention, mlp = block.attention, block.mlp
        assert isinstance(attention, FastAttention)  # says `is_available`
        self._add_norm(block.norm)
        self._ops.append(self._linear(attention.projections, output=self._heads, wait=1))
        place = {"input": self._heads, "layer": layer, "window": window, "wait": 1}
        norm_HK = None if attention.norm_HK is None else attention.norm_HK.float()
        self._add(_HEADS, [], weight=norm_HK, frequencies=self._frequencies, eps=attention.eps, **place)
        self._add(_ATTEND, [], output=self._y, **place)
        self._add_result(attention.output, self._y, block.factor)
        self._add_norm(block.mlp_norm)
        if isinstance(mlp, FastMLP):
            mode = _ACTIVATIONS[mlp.activation]
            self._ops.append(self._linear(mlp.up, output=self._hidden, mode=mode, wait=1))
            self._add_result(mlp.down, self._hidden, block.mlp_factor)
        elif isinstance(mlp, FastSwiGLU):
            self._add(_SWIGLU, [self._matrix(mlp.both)], output=self._hidden, wait=1)
            self._add_result(mlp.down, self._hidden, block.mlp_factor)
        else:
            self._add_experts(mlp, block.mlp_factor)

    def _add_experts(self, mlp: FastMoE, factor: float) -> None:
        router = mlp.router
        self._add(
            _ROUTE,
            [self._matrix(Weights(router.weight.detach()))],
            mode=_ROUTERS[router.kind, router.normalized],
            bias=router.selection_bias,
            factor=router.scaling,
        )
        if mlp.shared is not None:
            self._add(_SWIGLU, [self._matrix(mlp.shared.both)], output=self._hidden)
        self._add(_SWIGLU, [self._matrix(both) for both in mlp.both], output=self._routed, routed=1, wait=1)
        if mlp.shared is not None:
            self._add_result(mlp.shared.down, self._hidden, factor, wait=0)
        down = [self._matrix(part) for part in mlp.down]
        self._add(_LINEAR, down, input=self._routed, output=self._x, routed=1, add=1, factor=factor, wait=1)

    def _add_result(self, product: Product, source: Tensor, factor: float, wait: int = 1) -> None:
        """Add a branch's last product to the residual stream."""
        self._ops.append(self._linear(product, input=source, output=self._x, add=1, factor=factor, wait=wait))

    def _add_norm(self, norm: FastNorm, output: Tensor | None = None) -> None:
        mode = 0 if norm.is_rms else 1
        self._add(
            _NORM, [], input=self._x, output=output, weight=norm.weight_D, bias=norm.bias_D, eps=norm.eps, mode=mode
        )

    def _linear(self, product: Product, **fields: Any) -> Op:
        return self._op(_LINEAR, [self._matrix(product)], **fields)

    def _add(self, kind: int, matrices: list[Matrix], **fields: Any) -> None:
        self._ops.append(self._op(kind, matrices, **fields))

    def _op(self, kind: int, matrices: list[Matrix], factor: float = 1.0, **fields: Any) -> Op:
        array = (Matrix * len(matrices))(*matrices)
        self._alive.append(array)
        values = {name: self._pointer(value) if isinstance(value, Tensor) else value for name, value in fields.items()}
        return Op(kind=kind, matrices=array, factor=factor, **values)

    def _matrix(self, product: Product) -> Matrix:
        assert isinstance(product, Weights)
        numbers_FD = product.numbers_FD.contiguous()
        scale_F, bias_F = (None if part is None else part.float() for part in (product.scale_F, product.bias_F))
        rows, columns = numbers_FD.shape
        return Matrix(
            numbers=self._pointer(numbers_FD),
            scale=self._pointer(scale_F),
            bias=self._pointer(bias_F),
            type=_TYPES[numbers_FD.dtype],
            rows=rows,
            columns=columns,
        )

    def _buffer(self, width: int) -> Tensor:
        """Return memory for rows of so many numbers."""
        return torch.empty(MOST_TOKENS, width)

    def _pointer(self, tensor: Tensor | None) -> int | None:
        self._alive.append(tensor)
        return None if tensor is None else tensor.data_ptr()
