"""What a model is: every number that decides its shape, with the rules that hold between them."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `Transformer`. Names are the field's (Hugging Face's where it has one).

    A value of 0 for `vocab_size`, `num_kv_heads`, `head_dim`, `intermediate_size` or `moe_intermediate_size` asks for
    the default that its comment gives; `resolved()` puts it in.
    """

    # Read by pydantic where a recipe embeds this class: an unknown key is an error, not ignored.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    num_layers: int
    hidden_size: int
    num_heads: int
    max_seq_len: int
    vocab_size: int = 0  # from the data folder's tokenizer
    num_kv_heads: int = 0  # num_heads, plain multi-head attention; fewer is grouped-query attention
    head_dim: int = 0  # hidden_size / num_heads
    intermediate_size: int = 0  # 4 x hidden_size; for swiglu 8/3 x, up to a multiple of 64 (equal parameters)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    mlp: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    qk_norm: bool = False  # RMSNorm over each query and key head before the rotation (Qwen3)
    tie_embeddings: bool = True  # the output head is the token embedding
    bias: bool = False  # biases on every projection and, for layernorm, on the norms (GPT-2)
    layer_sharing: int = 1  # each block runs this many times in succession with the same weights (MobileLLM-LS)
    sliding_window: int = 0  # banded layers see this many positions, their own included; 0: every layer sees all
    full_attention_interval: int = 2  # with sliding_window: layers 0, n, 2n, ... see all, the others are banded
    init_std: float = 0.02
    num_experts: int = 0  # routed experts of a layer (DeepSeekMoE, arXiv 2401.06066); 0: every layer is dense
    num_experts_per_tok: int = 2  # of them, chosen for each token
    num_shared_experts: int = 0  # experts that every token passes through, as one network of their joint size
    moe_intermediate_size: int = 0  # of one expert; intermediate_size / num_experts_per_tok (equal active parameters)
    first_k_dense: int = 0  # this many blocks at the start keep a dense network of intermediate_size
    router: Literal["sigmoid", "softmax"] = "sigmoid"  # sigmoid: balanced by a bias in the choice (arXiv 2408.15664)
    norm_topk_prob: bool = True  # the chosen experts' weights sum to 1
    routed_scaling_factor: float = 1.0  # of the routed experts' sum

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
