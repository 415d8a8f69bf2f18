"""What a model is: every number that decides its shape, with the rules that hold between them."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

_MOE_KEYS = (
    "num_experts_per_tok",
    "num_shared_experts",
    "moe_intermediate_size",
    "first_k_dense",
    "router",
    "norm_topk_prob",
    "routed_scaling_factor",
)


# Field names of earlier versions, which their checkpoints still hold.
RENAMED_FIELDS = {"block_repeats": "layer_sharing", "full_attention_every": "full_attention_interval"}


_T = TypeVar("_T")


def _key(default: _T, description: str) -> _T:
    """Return a field with a default; pydantic copies its description into the JSON Schema of recipes."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `Transformer`. Names are the field's (Hugging Face's where it has one).

    A value of 0 for `vocab_size`, `num_kv_heads`, `head_dim`, `intermediate_size` or `moe_intermediate_size` asks for
    the default that its comment gives; `resolved()` puts it in.
    """

    # Read by pydantic where a recipe embeds this class: an unknown key is an error, not ignored.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

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
    head_dim: int = _key(0, "Width of one head. 0 takes hidden_size / num_heads.")
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
    mlp: Literal["swiglu", "gelu", "relu2"] = _key(
        "swiglu",
        "Feed-forward network: `swiglu` (Llama), `gelu` in the tanh approximation (GPT-2), or `relu2`, the squared "
        "ReLU (arXiv 2109.08668).",
    )
    qk_norm: bool = _key(False, "Apply RMSNorm to each query and key head before the rotation (Qwen3).")
    tie_embeddings: bool = _key(True, "Use the token table as the output head as well.")
    bias: bool = _key(False, "Add biases to every projection and, with layernorm, to the norms (GPT-2).")
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

    def resolved(self) -> "ModelConfig":
        """The same shape with every default written out; raises ValueError listing all that does not fit."""
        if problems := self.problems():
            raise ValueError("; ".join(f"{key}: {message}" for key, message in problems))
        values = asdict(self)
        values["num_kv_heads"] = self.num_kv_heads or self.num_heads
        values["head_dim"] = self.head_dim or self.hidden_size // self.num_heads
        if not self.intermediate_size:
            swiglu = (8 * self.hidden_size // 3 + 63) // 64 * 64
            values["intermediate_size"] = swiglu if self.mlp == "swiglu" else 4 * self.hidden_size
        if self.num_experts and not self.moe_intermediate_size:
            values["moe_intermediate_size"] = max(values["intermediate_size"] // self.num_experts_per_tok, 1)
        return ModelConfig(**values)

    def problems(self) -> list[tuple[str, str]]:
        """All (key, message) pairs that keep this from being a model; empty when it is one."""
        found = []
        at_least_one = (
            "num_layers",
            "hidden_size",
            "num_heads",
            "max_seq_len",
            "layer_sharing",
            "full_attention_interval",
        )
        for key in at_least_one:
            if getattr(self, key) < 1:
                found.append((key, f"must be at least 1, is {getattr(self, key)}"))
        not_negative = (
            "vocab_size",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "sliding_window",
            "num_experts",
            "num_shared_experts",
            "moe_intermediate_size",
            "first_k_dense",
        )
        for key in not_negative:
            if getattr(self, key) < 0:
                found.append((key, f"must not be negative, is {getattr(self, key)}"))
        for key in ("norm_eps", "rope_theta", "init_std", "routed_scaling_factor"):
            if not getattr(self, key) > 0:
                found.append((key, f"must be above 0, is {getattr(self, key)}"))
        if found:
            return found
        if not self.head_dim and self.hidden_size % self.num_heads:
            found.append(
                ("num_heads", f"{self.num_heads} does not divide hidden_size {self.hidden_size}; set head_dim")
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            found.append(("num_kv_heads", f"{self.num_kv_heads} does not divide num_heads {self.num_heads}"))
        if self.position == "rope" and (self.head_dim or self.hidden_size // self.num_heads) % 2:
            found.append(("head_dim", "must be even for rotary positions (position: rope)"))
        return found + self._moe_problems()

    def _moe_problems(self) -> list[tuple[str, str]]:
        if not self.num_experts:
            set_in_vain = [
                key for key in _MOE_KEYS if getattr(self, key) != type(self).__dataclass_fields__[key].default
            ]
            return [(key, "has no effect without num_experts") for key in set_in_vain]
        found = []
        chosen = self.num_experts_per_tok
        if not 1 <= chosen <= self.num_experts:
            found.append(("num_experts_per_tok", f"must be from 1 to num_experts, {self.num_experts}, is {chosen}"))
        if self.first_k_dense >= self.num_layers:
            found.append(("first_k_dense", f"leaves no layer of experts: num_layers is {self.num_layers}"))
        if self.mlp != "swiglu":
            found.append(("mlp", f"experts are swiglu networks, is {self.mlp}"))
        if self.bias:
            found.append(("bias", "experts and their router have no biases; must be false with num_experts"))
        if chosen == 1 and self.norm_topk_prob:
            found.append(("norm_topk_prob", "must be false with one expert a token: its weight would always be 1"))
        return found

    def has_experts(self, block: int) -> bool:
        """Whether block `block` (0 <= block < num_layers) is a mixture of experts."""
        return self.num_experts > 0 and block >= self.first_k_dense

    @property
    def depth(self) -> int:
        """Layers as run: blocks times their repeats."""
        return self.num_layers * self.layer_sharing

    def window(self, layer: int) -> int:
        """How many positions layer `layer` (0 <= layer < depth) sees, its own included; 0 means all."""
        return self.sliding_window if layer % self.full_attention_interval else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
