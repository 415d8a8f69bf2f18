"""The shape of a model: every number that decides it, with the rules that hold between them."""

import math
import reprlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

_AT_LEAST = dict.fromkeys(
    ("num_layers", "hidden_size", "num_heads", "max_seq_len", "layer_sharing", "full_attention_interval"), 1
) | dict.fromkeys(("vocab_size", "num_kv_heads", "head_dim", "intermediate_size", "sliding_window", "num_experts"), 0)
_AT_LEAST |= {"num_shared_experts": 0, "moe_intermediate_size": 0, "first_k_dense": 0}
_AT_LEAST |= {"base_depth": 0, "rope_original_seq_len": 0}
_AT_LEAST |= {"q_lora_rank": 0, "kv_lora_rank": 0, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
_ABOVE_ZERO = (
    *("norm_eps", "rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"),
    *("init_std", "routed_scaling_factor", "qk_gain", "embedding_scale"),
)
_BELOW = 1 << 31  # every whole number: sizes beyond it are damage, and overflow
# Fields whose parameters and factors `lightlm.convert.folding` multiplies into the weights of a model without them.
FOLDABLE_FIELDS = ("multipliers", "residual_scale", "qk_gain", "embedding_scale", "base_depth")
# Fields that have no effect in a model without experts.
EXPERT_FIELDS = (
    "num_experts_per_tok",
    "num_shared_experts",
    "moe_intermediate_size",
    "first_k_dense",
    "router",
    "norm_topk_prob",
    "routed_scaling_factor",
)

LATENT_NORM_EPS = 1e-6  # of the norms of latents, whatever `norm_eps` is: DeepSeek's code and transformers have it so
# Fields of multi-head latent attention.
LATENT_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

# Fields that decide how rotary positions turn.
ROPE_FIELDS = (
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_seq_len",
)
# The parts of a model that have biases, by `bias_in`; norms have them only with layernorm.
Part = Literal["qkv", "output", "mlp", "norm"]
BIASED: dict[str, tuple[Part, ...]] = {
    "all": ("qkv", "output", "mlp", "norm"),
    "attention": ("qkv", "output"),
    "qkv": ("qkv",),
    "mlp": ("mlp",),
}

# Field names in checkpoints of earlier versions, and their names today.
RENAMED_FIELDS = {"block_repeats": "layer_sharing", "full_attention_every": "full_attention_interval"}


def _key(default: Any, description: str) -> Any:
    """Return a field with a default; pydantic copies its description into the JSON Schema of recipes."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `Transformer`. Names are Hugging Face's where it has one.

    Sizes that may be 0 then have the default that the field documents; `resolved()` fills it in.
    """

    # Read by pydantic where a recipe embeds this class: an unknown key is an error, not ignored.
    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012

    num_layers: int = field(metadata={"description": "Blocks of the network; layer_sharing repeats each of them."})
    hidden_size: int = field(metadata={"description": "Width of the residual stream."})
    num_heads: int = field(metadata={"description": "Query heads per layer."})
    max_seq_len: int = field(
        metadata={"description": "Longest sequence that the model reads, in tokens; training sequences are as long."}
    )
    vocab_size: int = _key(0, "Entries of the token table. 0 takes the vocabulary of the data folder's tokenizer.")
    num_kv_heads: int = _key(
        0, "Key and value heads per layer. 0 takes num_heads (multi-head attention); fewer is grouped-query attention."
    )
    head_dim: int = _key(
        0,
        "Width of one head. 0 takes hidden_size / num_heads; with attention=mla it is qk_nope_head_dim + "
        "qk_rope_head_dim.",
    )
    attention: Literal["gqa", "mla"] = _key(
        "gqa",
        "`gqa` has keys and values of num_kv_heads heads (arXiv 2305.13245). `mla` is multi-head latent attention "
        "(DeepSeek-V2 and V3, arXiv 2405.04434): all heads make keys and values from one normalized latent, and the "
        "cache holds that and one rotary key.",
    )
    kv_lora_rank: int = _key(
        0, "With attention=mla: width of the latent of keys and values. 0 takes 4 x qk_nope_head_dim."
    )
    q_lora_rank: int = _key(
        0, "With attention=mla: width of the latent of queries. 0 makes queries from the hidden state directly."
    )
    qk_nope_head_dim: int = _key(
        0, "With attention=mla: channels of a query or key head without positions. 0 takes hidden_size / num_heads."
    )
    qk_rope_head_dim: int = _key(
        0,
        "With attention=mla: further channels of each query head that rotate, with one key for all heads. 0 takes half "
        "of qk_nope_head_dim, rounded down to an even number.",
    )
    v_head_dim: int = _key(0, "With attention=mla: width of a value head. 0 takes qk_nope_head_dim.")
    intermediate_size: int = _key(
        0,
        "Width of the feed-forward network. 0 takes 4 x hidden_size; for swiglu 8/3 x hidden_size, rounded up to a "
        "multiple of 64, which has equally many parameters.",
    )
    norm: Literal["rmsnorm", "layernorm"] = _key(
        "rmsnorm", "Normalization before attention, before the feed-forward network, and before the head."
    )
    norm_eps: float = _key(1e-5, "Small number added to the variance in every norm.")
    position: Literal["rope", "learned"] = _key(
        "rope",
        "How positions enter: `rope` rotates queries and keys; `learned` adds a table of max_seq_len vectors (GPT-2).",
    )
    rope_theta: float = _key(10_000.0, "Base of the rotary frequencies.")
    rope_scaling: Literal["none", "linear", "llama3"] = _key(
        "none",
        "How rotary frequencies are lowered for texts longer than those of the first training: `linear` divides all by "
        "rope_factor (arXiv 2306.15595), `llama3` only those whose period is long (arXiv 2407.21783, section 3.4).",
    )
    rope_factor: float = _key(1.0, "With rope_scaling: what frequencies are divided by.")
    rope_low_freq_factor: float = _key(
        1.0, "With rope_scaling=llama3: frequencies that turn fewer times in rope_original_seq_len are divided."
    )
    rope_high_freq_factor: float = _key(
        4.0, "With rope_scaling=llama3: frequencies that turn more times stay; those between are blended."
    )
    rope_original_seq_len: int = _key(
        0, "With rope_scaling=llama3: sequence length of the first training. 0 takes max_seq_len."
    )
    mlp: Literal["swiglu", "gelu", "gelu_erf", "relu2"] = _key(
        "swiglu",
        "Feed-forward network: `swiglu` (Llama), `gelu` in the tanh approximation (GPT-2), `gelu_erf`, which is GELU "
        "itself (nanoGPT), or `relu2`, the squared ReLU (arXiv 2109.08668).",
    )
    qk_norm: bool = _key(False, "Apply RMSNorm to each query and key head before the rotation (Qwen3).")
    attention_gate: bool = _key(
        False,
        "Multiply each channel of the attention's output by a sigmoid of the layer's input, before the output "
        "projection (arXiv 2505.06708; Qwen3.5).",
    )
    tie_embeddings: bool = _key(True, "Use the token table as the output head as well.")
    bias: bool = _key(False, "Add biases to every projection and, with layernorm, to the norms (GPT-2).")
    bias_in: Literal["all", "attention", "qkv", "mlp"] = _key(
        "all",
        "With bias: which projections have one. `attention` are its four, `qkv` those into it (Qwen2), `mlp` those of "
        "the feed-forward network.",
    )
    layer_sharing: int = _key(
        1, "Times that each block runs in succession with the same weights (MobileLLM-LS, arXiv 2402.14905)."
    )
    sliding_window: int = _key(
        0, "Positions that a banded layer sees, its own included. 0 lets every layer see all positions."
    )
    full_attention_interval: int = _key(
        2, "With sliding_window: layers 0, n, 2n, ... see all positions; the others are banded."
    )
    init_std: float = _key(
        0.02,
        "Standard deviation of the initial weights (GPT-2's). SmolLM2-135M uses 1 / sqrt(hidden_size), which suits "
        "small widths better.",
    )
    num_experts: int = _key(0, "Routed experts per layer (DeepSeekMoE, arXiv 2401.06066). 0 makes every layer dense.")
    num_experts_per_tok: int = _key(2, "Routed experts that the router chooses for each token.")
    num_shared_experts: int = _key(
        0, "Experts that every token passes through. They are stored as one network of their joint width."
    )
    moe_intermediate_size: int = _key(
        0,
        "Width of one expert. 0 takes intermediate_size / num_experts_per_tok, so that a token meets as many weights "
        "as in a dense layer.",
    )
    first_k_dense: int = _key(0, "Blocks at the start that keep a dense network of intermediate_size.")
    router: Literal["sigmoid", "softmax"] = _key(
        "sigmoid",
        "Gates of the experts. `sigmoid` balances loads by a bias in the choice (arXiv 2408.15664), `softmax` by an "
        "auxiliary loss.",
    )
    norm_topk_prob: bool = _key(True, "Scale the weights of the chosen experts to a sum of 1.")
    routed_scaling_factor: float = _key(1.0, "Factor on the sum of the routed experts.")

    multipliers: Literal["none", "rows", "columns", "both"] = _key(
        "none",
        "Learnable factors, 1 at first, on the rows or columns of each matrix in the blocks, experts included (arXiv "
        "2601.04890). They fold into the weights on export.",
    )
    residual_scale: float | None = _key(
        None,
        "Initial value of a learnable factor on each residual branch, two per block (ReZero, arXiv 2003.04887, starts "
        "at 0). null leaves it out. It folds into the weights on export.",
    )
    qk_gain: float = _key(
        1.0, "With qk_norm: initial weights of the norms of queries and keys. Attention logits grow with its square."
    )
    embedding_scale: float = _key(
        1.0, "Factor on the token embeddings that enter the first block (Gemma: sqrt(hidden_size)). It folds on export."
    )
    base_depth: int = _key(
        0,
        "Layers of the model that rates and initial weights were tuned for (CompleteP, arXiv 2505.01618): residual "
        "branches and AdamW's eps are multiplied by base_depth / layers. 0 leaves both as they are. It folds on "
        "export.",
    )

    def resolved(self) -> "ModelConfig":
        """Return the same shape with every default filled in.

        Raises:
            ValueError: this is not a model; the message lists every problem.
        """
        if problems := self.problems():
            raise ValueError("; ".join(f"{key}: {message}" for key, message in problems))
        swiglu_size = (8 * self.hidden_size // 3 + 63) // 64 * 64
        dense_size = self.intermediate_size or (swiglu_size if self.mlp == "swiglu" else 4 * self.hidden_size)
        expert_size = max(dense_size // self.num_experts_per_tok, 1) if self.num_experts else 0
        config = self
        if self.attention == "mla":
            for name, size in self._latent_sizes().items():
                config = replace(config, **{name: size})  # type: ignore[arg-type]
        return replace(
            config,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=config.head_dim or self.hidden_size // self.num_heads,
            intermediate_size=dense_size,
            moe_intermediate_size=self.moe_intermediate_size or expert_size,
            rope_original_seq_len=self.rope_original_seq_len
            or (self.max_seq_len if self.rope_scaling == "llama3" else 0),
        )

    def _latent_sizes(self) -> dict[str, int]:
        """Return the sizes of latent attention, with every default filled in."""
        nope = self.qk_nope_head_dim or self.hidden_size // self.num_heads
        rope = self.qk_rope_head_dim or max(nope // 4, 1) * 2
        return {
            "kv_lora_rank": self.kv_lora_rank or 4 * nope,
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope,
            "v_head_dim": self.v_head_dim or nope,
            "head_dim": nope + rope,
        }

    def problems(self) -> list[tuple[str, str]]:
        """Return a (key, message) pair for everything that keeps this from being a model."""
        low = [(key, f"must be at least {least}") for key, least in _AT_LEAST.items() if getattr(self, key) < least]
        low += [
            (key, "must be a number above 0") for key in _ABOVE_ZERO if not 0 < getattr(self, key) <= sys.float_info.max
        ]
        low += [
            (each.name, f"must be below {_BELOW:,}")
            for each in fields(self)
            if each.type is int and getattr(self, each.name) >= _BELOW
        ]
        if self.residual_scale is not None and not 0 <= self.residual_scale < math.inf:
            low.append(("residual_scale", "must be null or a number of at least 0"))
        return [(key, f"{message}, is {reprlib.repr(getattr(self, key))}") for key, message in low] or list(
            self._broken_rules()
        )

    def _broken_rules(self) -> Iterator[tuple[str, str]]:
        """Yield a (key, message) pair for each rule that the fields break together; each of them is in its range."""
        given, size = ("qk_nope_head_dim" if self.attention == "mla" else "head_dim"), self.hidden_size
        if getattr(self, given) == 0 and size % self.num_heads != 0:
            yield "num_heads", f"{self.num_heads} does not divide hidden_size {size}; set {given}"
        if self.attention == "mla":
            yield from self._broken_latent_rules()
        else:
            if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads != 0:
                yield "num_kv_heads", f"{self.num_kv_heads} does not divide num_heads {self.num_heads}"
            yield from ((key, message) for key, message in self.idle_given() if key in LATENT_FIELDS)
            if self.position == "rope" and (self.head_dim or size // self.num_heads) % 2 != 0:
                yield "head_dim", "must be even for rotary positions (position: rope)"
        if self.rope_scaling == "llama3" and self.rope_high_freq_factor <= self.rope_low_freq_factor:
            yield "rope_high_freq_factor", f"must be above rope_low_freq_factor, {self.rope_low_freq_factor}"
        if not self.num_experts:
            yield from ((key, message) for key, message in self.idle_given() if key in EXPERT_FIELDS)
            return
        chosen = self.num_experts_per_tok
        if not 1 <= chosen <= self.num_experts:
            yield "num_experts_per_tok", f"must be from 1 to num_experts, {self.num_experts}, is {chosen}"
        if self.first_k_dense >= self.num_layers:
            yield "first_k_dense", f"leaves no layer of experts: num_layers is {self.num_layers}"
        if self.mlp != "swiglu":
            yield "mlp", f"experts are swiglu networks, is {self.mlp}"
        if self.bias:
            yield "bias", "experts and their router have no biases; must be false with num_experts"
        if chosen == 1 and self.norm_topk_prob:
            yield "norm_topk_prob", "must be false with one expert per token: its weight would always be 1"

    def _broken_latent_rules(self) -> Iterator[tuple[str, str]]:
        """Yield a (key, message) pair for each field that latent attention cannot have."""
        sizes = self._latent_sizes()
        if self.position != "rope":
            yield "position", f"must be rope with attention: mla, is {self.position}"
        if sizes["qk_rope_head_dim"] % 2 != 0:
            yield "qk_rope_head_dim", f"must be even, is {self.qk_rope_head_dim}"
        if self.num_kv_heads not in (0, self.num_heads):
            yield "num_kv_heads", f"has no meaning with attention: mla; leave it out or set {self.num_heads}, num_heads"
        if self.head_dim not in (0, sizes["head_dim"]):
            yield (
                "head_dim",
                f"is qk_nope_head_dim + qk_rope_head_dim, {sizes['head_dim']}, with attention: mla; leave it out",
            )
        for key in ("qk_norm", "attention_gate"):
            if getattr(self, key):
                yield key, "is not there with attention: mla; must be false"
        if self.has_bias("qkv") or self.has_bias("output"):
            yield "bias", "projections of attention: mla have no biases; must be false, or bias_in must be mlp"

    def idle(self) -> dict[str, str]:
        """Return the fields that have no effect beside the others, each with the reason.

        They do no harm in a checkpoint; a recipe that gives one another value than its default is a slip.
        """
        idle = {} if self.num_experts else dict.fromkeys(EXPERT_FIELDS, "without model.num_experts")
        if self.attention != "mla":
            idle |= dict.fromkeys(LATENT_FIELDS, "without model.attention=mla")
        if self.position != "rope":
            idle |= dict.fromkeys(ROPE_FIELDS, f"with model.position={self.position}")
        elif self.rope_scaling == "none":
            idle |= dict.fromkeys(ROPE_FIELDS[2:], "without model.rope_scaling")
        elif self.rope_scaling == "linear":
            idle |= dict.fromkeys(ROPE_FIELDS[3:], "with model.rope_scaling=linear")
        if not self.bias:
            idle["bias_in"] = "without model.bias"
        if not self.qk_norm:
            idle["qk_gain"] = "without model.qk_norm"
        if not self.sliding_window:
            idle["full_attention_interval"] = "without model.sliding_window"
        elif self.full_attention_interval == 1:
            idle["sliding_window"] = "with model.full_attention_interval=1, which lets every layer see all positions"
        elif self.sliding_window >= self.max_seq_len:
            idle["sliding_window"] = f"with model.max_seq_len={self.max_seq_len}: the band is as wide"
        if self.num_experts and not self.first_k_dense and self.moe_intermediate_size:
            idle["intermediate_size"] = "with model.moe_intermediate_size, if no layer is dense"
        return idle

    def idle_given(self) -> list[tuple[str, str]]:
        """Return a (key, message) pair for each field that has no effect and not its default either."""
        given = [(key, why) for key, why in self.idle().items() if getattr(self, key) != getattr(ModelConfig, key)]
        return [(key, f"has no effect {why}; leave it out") for key, why in given]

    def has_bias(self, part: Part) -> bool:
        """Return whether the projections into attention (gates too), out of it, or in an MLP, or norms have biases."""
        return self.bias and part in BIASED[self.bias_in]

    def has_experts(self, block: int) -> bool:
        """Return whether block `block` (0 <= block < num_layers) is a mixture of experts."""
        return self.num_experts > 0 and block >= self.first_k_dense

    @property
    def depth(self) -> int:
        """The number of layers that run: blocks times their repeats."""
        return self.num_layers * self.layer_sharing

    @property
    def rotary_dim(self) -> int:
        """The channels of a head that rotate, of a resolved configuration."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def value_dim(self) -> int:
        """The width of a value head, of a resolved configuration."""
        return self.v_head_dim if self.attention == "mla" else self.head_dim

    @property
    def cached_shape(self) -> tuple[int, int, int]:
        """The cache of one token in one layer, of a resolved configuration: tensors, heads, channels.

        The tensors are keys and values, or the latent with the rotary key.
        """
        if self.attention == "mla":
            return 1, 1, self.kv_lora_rank + self.qk_rope_head_dim
        return 2, self.num_kv_heads, self.head_dim

    @property
    def depth_factor(self) -> float:
        """The factor of CompleteP on residual branches and on AdamW's eps; 1 without `base_depth`."""
        return self.base_depth / self.depth if self.base_depth else 1.0

    def folded(self) -> "ModelConfig":
        """Return the shape of the model that `lightlm.convert.folding.fold` makes: without what folds."""
        return replace(self, **{name: getattr(ModelConfig, name) for name in FOLDABLE_FIELDS})

    def window(self, layer: int) -> int:
        """Return how many positions layer `layer` (0 <= layer < depth) sees, its own included; 0 means all."""
        return self.sliding_window if layer % self.full_attention_interval else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and their values, as in a checkpoint's config.json."""
        return asdict(self)
