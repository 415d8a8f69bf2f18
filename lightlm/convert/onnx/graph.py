"""A model as an ONNX graph that continues from cached keys and values: one graph for prompts and for single tokens.

Inputs and outputs have the names that optimum, transformers.js and onnxruntime-genai use.

Shapes: B batch, T tokens of this call, P cached positions, S = P + T, N = B T, D hidden size, H query heads, G
key/value heads, R = H / G, K head size, E experts, V vocabulary.
"""

import math

import onnx
import torch
from torch import Tensor

from lightlm import __version__
from lightlm.convert.onnx.builder import Builder
from lightlm.model.config import ModelConfig
from lightlm.model.rotary import rotary_frequencies

PAST = ("past_key_values.{}.key", "past_key_values.{}.value")
PRESENT = ("present.{}.key", "present.{}.value")
# What is added to the scores of keys that a query does not see. It is finite: a row of padding sees nothing, and its
# softmax would be NaN, which passes through every mask of the next layer.
_HIDDEN = torch.finfo(torch.float32).min


def build_graph(
    config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype, *, quantized: bool = False
) -> onnx.ModelProto:
    """Return the graph of a model without scales to fold.

    Args:
        config: resolved and folded.
        state: the tensors of a `Transformer` of this configuration.
        dtype: precision in which weights are stored; the graph computes in float32.
        quantized: store matrices in 8 bits.
    """
    graph = _Graph(config, state, Builder(dtype, quantized=quantized))
    x = graph.embed()
    for layer in range(config.depth):
        block = layer // config.layer_sharing
        name = f"blocks.{block}"
        x = graph.b.add("Add", x, graph.attention(graph.norm(x, f"{name}.attention_norm"), layer, f"{name}.attention"))
        network = graph.experts if config.has_experts(block) else graph.network
        x = graph.b.add("Add", x, network(graph.norm(x, f"{name}.mlp_norm"), f"{name}.mlp"))
    graph.finish(graph.norm(x, "norm"))
    return graph.b.model({"lightlm_version": __version__})


class _Graph:
    """The parts of a model. Activations are (N, D), except in attention."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor], builder: Builder) -> None:
        self.config, self.state, self.b = config, state, builder
        b = builder
        self.tokens = b.input("input_ids", torch.int64, ("batch_size", "sequence_length"))
        self.seen = b.input("attention_mask", torch.int64, ("batch_size", "total_sequence_length"))
        self.positions = b.input("position_ids", torch.int64, ("batch_size", "sequence_length"))
        cached = ("batch_size", config.num_kv_heads, "past_sequence_length", config.head_dim)
        self.past = [
            tuple(b.input(name.format(layer), torch.float32, cached) for name in PAST) for layer in range(config.depth)
        ]
        self.present: list[tuple[str, str]] = []
        # Sizes B, T, P and S, each a vector of one number.
        self.batch, self.length = (b.add("Shape", self.tokens, start=axis, end=axis + 1) for axis in (0, 1))
        self.past_length = b.add("Shape", self.past[0][0], start=2, end=3)
        self.total = b.add("Add", self.past_length, self.length)
        windows = {config.window(layer) for layer in range(config.depth)}
        self.biases = {window: self._bias(window) for window in sorted(windows)}
        self.rotation = self._rotation() if config.position == "rope" else ("", "")

    def embed(self) -> str:
        """Return the embeddings of the tokens (N, D)."""
        b = self.b
        x = b.rows("embed_tokens", self.state["embed_tokens.weight"], b.add("Reshape", self.tokens, b.ints(-1)))
        if self.config.position == "learned":
            table = b.weight("embed_positions.weight", self.state["embed_positions.weight"])
            x = b.add("Add", x, b.add("Gather", table, b.add("Reshape", self.positions, b.ints(-1))))
        return x

    def finish(self, x: str) -> None:
        """Add the outputs: the logits (B, T, V) of final hidden states (N, D), and all keys and values."""
        size = self.config.vocab_size
        name = "embed_tokens" if self.config.tie_embeddings else "lm_head"
        logits = self._shaped(self._linear(x, name), self.batch, self.length, self.b.ints(size))
        self.b.output("logits", logits, ("batch_size", "sequence_length", size))
        grown = ("batch_size", self.config.num_kv_heads, "total_sequence_length", self.config.head_dim)
        for layer, pair in enumerate(self.present):
            for name, value in zip(PRESENT, pair, strict=True):
                self.b.output(name.format(layer), value, grown)

    def norm(self, x: str, name: str) -> str:
        """Return x (..., D) normalized over its last dimension."""
        b, eps = self.b, self.config.norm_eps
        weight = b.weight(f"{name}.weight", self.state[f"{name}.weight"])
        if self.config.norm == "layernorm" and not name.endswith(("q_norm", "k_norm")):
            bias = self.state.get(f"{name}.bias")
            operands = [weight] if bias is None else [weight, b.weight(f"{name}.bias", bias)]
            return b.add("LayerNormalization", x, *operands, axis=-1, epsilon=eps)
        mean = b.add("ReduceMean", b.add("Mul", x, x), b.ints(-1))
        root = b.add("Sqrt", b.add("Add", mean, b.number(eps)))
        return b.add("Mul", b.add("Div", x, root), weight)

    def attention(self, x: str, layer: int, name: str) -> str:
        """Return the attention output of a layer (N, D)."""
        b, config = self.b, self.config
        heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
        q_BHTK = self._heads(self._linear(x, f"{name}.q_proj"), heads, f"{name}.q_norm")
        new = [
            self._heads(self._linear(x, f"{name}.k_proj"), groups, f"{name}.k_norm"),
            b.add("Transpose", self._split(self._linear(x, f"{name}.v_proj"), groups), perm=[0, 2, 1, 3]),
        ]
        k_BGSK, v_BGSK = (b.add("Concat", *pair, axis=2) for pair in zip(self.past[layer], new, strict=True))
        self.present.append((k_BGSK, v_BGSK))
        # The R query heads of a group share one product with its keys: (B, G, R T, S).
        q_BGRTK = b.add("Reshape", b.add("Mul", q_BHTK, b.number(size**-0.5)), b.ints(0, groups, -1, size))
        scores = b.add("MatMul", q_BGRTK, b.add("Transpose", k_BGSK, perm=[0, 1, 3, 2]))
        scores_BHTS = self._shaped(scores, self.batch, b.ints(heads), self.length, self.total)
        weights_BHTS = b.add("Softmax", b.add("Add", scores_BHTS, self.biases[config.window(layer)]), axis=-1)
        weights = self._shaped(weights_BHTS, self.batch, b.ints(groups), b.ints(-1), self.total)
        y_BHTK = b.add("Reshape", b.add("MatMul", weights, v_BGSK), b.ints(0, heads, -1, size))
        y = b.add("Reshape", b.add("Transpose", y_BHTK, perm=[0, 2, 1, 3]), b.ints(-1, heads * size))
        if config.attention_gate:
            y = b.add("Mul", y, b.add("Sigmoid", self._linear(x, f"{name}.gate_proj")))
        return self._linear(y, f"{name}.o_proj")

    def network(self, x: str, name: str, stack: int | None = None) -> str:
        """Return the output (N, D) of a dense network, or of one expert of a stack."""
        b, kind = self.b, self.config.mlp
        up = self._linear(x, f"{name}.up_proj", stack)
        if kind == "swiglu":
            gate = self._linear(x, f"{name}.gate_proj", stack)
            hidden = b.add("Mul", b.add("Mul", gate, b.add("Sigmoid", gate)), up)
        elif kind == "relu2":
            hidden = b.add("Relu", up)
            hidden = b.add("Mul", hidden, hidden)
        elif kind == "gelu_erf":
            erf = b.add("Erf", b.add("Mul", up, b.number(math.sqrt(0.5))))
            hidden = b.add("Mul", b.add("Mul", up, b.number(0.5)), b.add("Add", erf, b.number(1.0)))
        else:  # GELU in the tanh approximation
            cube = b.add("Mul", b.add("Mul", up, up), up)
            inner = b.add("Add", up, b.add("Mul", cube, b.number(0.044715)))
            tanh = b.add("Tanh", b.add("Mul", inner, b.number(math.sqrt(2 / math.pi))))
            hidden = b.add("Mul", b.add("Mul", up, b.number(0.5)), b.add("Add", tanh, b.number(1.0)))
        return self._linear(hidden, f"{name}.down_proj", stack)

    def experts(self, x: str, name: str) -> str:
        """Return the output (N, D) of a mixture of experts. Each expert computes only its own tokens."""
        b, config = self.b, self.config
        router = b.constant(f"{name}.router.weight", self.state[f"{name}.router.weight"].float())
        logits_NE = b.add("Gemm", x, router, transB=1)
        scores_NE = b.add("Sigmoid", logits_NE) if config.router == "sigmoid" else b.add("Softmax", logits_NE, axis=-1)
        choice_NE = scores_NE
        if (bias := self.state.get(f"{name}.router.selection_bias")) is not None:
            choice_NE = b.add("Add", scores_NE, b.constant(f"{name}.router.selection_bias", bias))
        _, ids = b.add_several("TopK", choice_NE, b.ints(config.num_experts_per_tok), count=2, axis=-1)
        weights = b.add("GatherElements", scores_NE, ids, axis=1)
        if config.norm_topk_prob:
            total = b.add("ReduceSum", weights, b.ints(-1))
            weights = b.add("Div", weights, b.add("Add", total, b.number(1e-20)))
        if config.routed_scaling_factor != 1:
            weights = b.add("Mul", weights, b.number(config.routed_scaling_factor))
        zeros_NE = b.add("Mul", scores_NE, b.number(0.0))
        weights_EN = b.add("Transpose", b.add("ScatterElements", zeros_NE, ids, weights, axis=1), perm=[1, 0])
        columns = b.add_several("Split", weights_EN, count=config.num_experts, axis=0, num_outputs=config.num_experts)
        shared = f"{name}.shared"
        y = self.network(x, shared) if config.num_shared_experts else b.add("Mul", x, b.number(0.0))
        for expert, column in enumerate(columns):
            weight_N1 = b.add("Reshape", column, b.ints(-1, 1))
            tokens = b.add("NonZero", b.add("Reshape", column, b.ints(-1)))  # (1, tokens of the expert)
            tokens = b.add("Reshape", tokens, b.ints(-1))
            out = self.network(b.add("Gather", x, tokens), f"{name}.experts", expert)
            out = b.add("Mul", out, b.add("Gather", weight_N1, tokens))
            y = b.add("ScatterND", y, b.add("Unsqueeze", tokens, b.ints(1)), out, reduction="add")
        return y

    def _linear(self, x: str, name: str, stack: int | None = None) -> str:
        if stack is not None:  # the name of a stack of experts has no `.weight`
            return self.b.linear(x, f"{name}.{stack}", self.state[name][stack])
        return self.b.linear(x, name, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def _split(self, x: str, heads: int) -> str:
        """Return x (N, heads K) as (B, T, heads, K)."""
        return self._shaped(x, self.batch, self.length, self.b.ints(heads), self.b.ints(self.config.head_dim))

    def _heads(self, x: str, heads: int, norm: str) -> str:
        """Return queries or keys (B, heads, T, K), normalized and rotated as the model demands."""
        b, config = self.b, self.config
        x = self._split(x, heads)
        x = b.add("Transpose", self.norm(x, norm) if config.qk_norm else x, perm=[0, 2, 1, 3])
        if config.position != "rope":
            return x
        cos, sin = self.rotation
        first, second = b.add_several("Split", x, count=2, axis=-1, num_outputs=2)
        turned = b.add("Concat", b.add("Neg", second), first, axis=-1)
        return b.add("Add", b.add("Mul", x, cos), b.add("Mul", turned, sin))

    def _rotation(self) -> tuple[str, str]:
        """Return cosines and sines (B, 1, T, K), as `lightlm.model.rotary.rotary_table` computes them."""
        b, config = self.b, self.config
        frequencies = b.constant("frequencies", rotary_frequencies(config))
        positions = b.add("Unsqueeze", b.add("Cast", self.positions, to=onnx.TensorProto.FLOAT), b.ints(1, 3))
        angles = b.add("Mul", positions, frequencies)
        angles = b.add("Concat", angles, angles, axis=-1)
        return b.add("Cos", angles), b.add("Sin", angles)

    def _bias(self, window: int) -> str:
        """Return what is added to scores (B, 1, T, S): 0 where a query sees a key.

        It sees what is not behind it, not padding and, with a window, near. Places in the cache decide, so rows may be
        padded on the left.
        """
        b = self.b
        scalars = [b.add("Squeeze", size) for size in (self.past_length, self.total)]
        zero, one = (b.constant(f"int_{value}", torch.tensor(value)) for value in (0, 1))
        queries = b.add("Unsqueeze", b.add("Range", *scalars, one), b.ints(1))
        distance_TS = b.add("Sub", queries, b.add("Range", zero, scalars[1], one))
        visible = b.add("GreaterOrEqual", distance_TS, zero)
        if window:
            near = b.add("Less", distance_TS, b.constant(f"int_{window}", torch.tensor(window)))
            visible = b.add("And", visible, near)
        real = b.add("Cast", b.add("Unsqueeze", self.seen, b.ints(1, 2)), to=onnx.TensorProto.BOOL)
        return b.add("Where", b.add("And", real, visible), b.number(0.0), b.number(_HIDDEN))

    def _shaped(self, x: str, *sizes: str) -> str:
        return self.b.add("Reshape", x, self.b.add("Concat", *sizes, axis=0))
