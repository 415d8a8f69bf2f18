"""The shape of a model: every number that decides it, with the rules that hold between them."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

_AT_LEAST = dict.fromkeys(
    ("num_layers", "hidden_size", "num_heads", "max_seq_len", "layer_sharing", "full_attention_interval"), 1
) | dict.fromkeys(("vocab_size", "num_kv_heads", "head_dim", "intermediate_size", "sliding_window", "num_experts"), 0)
_AT_LEAST |= {"num_shared_experts": 0, "moe_intermediate_size": 0, "first_k_dense": 0}
_ABOVE_ZERO = ("norm_eps", "rope_theta", "init_std", "routed_scaling_factor")
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

# Field names in checkpoints of earlier versions, and their names today.
RENAMED_FIELDS = {"block_repeats": "layer_sharing", "full_attention_every": "full_attention_interval"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `Transformer`. Names are Hugging Face's where it has one.

    `vocab_size`, `num_kv_heads`, `head_dim`, `intermediate_size` and `moe_intermediate_size` may be 0, which means the
    default that the field documents; `resolved()` fills it in.
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
        """Return the same shape with every default filled in.

        Raises:
            ValueError: this is not a model; the message lists every problem.
        """
        if problems := self.problems():
            raise ValueError("; ".join(f"{key}: {message}" for key, message in problems))
        swiglu_size = (8 * self.hidden_size // 3 + 63) // 64 * 64
        dense_size = self.intermediate_size or (swiglu_size if self.mlp == "swiglu" else 4 * self.hidden_size)
        expert_size = max(dense_size // self.num_experts_per_tok, 1) if self.num_experts else 0
        return replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            intermediate_size=dense_size,
            moe_intermediate_size=self.moe_intermediate_size or expert_size,
        )

    def problems(self) -> list[tuple[str, str]]:
        """Return a (key, message) pair for everything that keeps this from being a model."""
        low = [(key, f"must be at least {least}") for key, least in _AT_LEAST.items() if getattr(self, key) < least]
        low += [(key, "must be above 0") for key in _ABOVE_ZERO if not getattr(self, key) > 0]
        if low:
            return [(key, f"{message}, is {getattr(self, key)}") for key, message in low]
        head_dim = self.head_dim or self.hidden_size // self.num_heads
        rules = [
            (
                "num_heads",
                self.head_dim == 0 and self.hidden_size % self.num_heads != 0,
                f"{self.num_heads} does not divide hidden_size {self.hidden_size}; set head_dim",
            ),
            (
                "num_kv_heads",
                self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads != 0,
                f"{self.num_kv_heads} does not divide num_heads {self.num_heads}",
            ),
            (
                "head_dim",
                self.position == "rope" and head_dim % 2 != 0,
                "must be even for rotary positions (position: rope)",
            ),
        ]
        if self.num_experts:
            rules += [
                (
                    "num_experts_per_tok",
                    not 1 <= self.num_experts_per_tok <= self.num_experts,
                    f"must be from 1 to num_experts, {self.num_experts}, is {self.num_experts_per_tok}",
                ),
                (
                    "first_k_dense",
                    self.first_k_dense >= self.num_layers,
                    f"leaves no layer of experts: num_layers is {self.num_layers}",
                ),
                ("mlp", self.mlp != "swiglu", f"experts are swiglu networks, is {self.mlp}"),
                ("bias", self.bias, "experts and their router have no biases; must be false with num_experts"),
                (
                    "norm_topk_prob",
                    self.num_experts_per_tok == 1 and self.norm_topk_prob,
                    "must be false with one expert per token: its weight would always be 1",
                ),
            ]
        else:
            defaults = {field.name: field.default for field in fields(self)}
            unused = (key for key in EXPERT_FIELDS if getattr(self, key) != defaults[key])
            rules += [(key, True, "has no effect without num_experts") for key in unused]
        return [(key, message) for key, broken, message in rules if broken]

    def has_experts(self, block: int) -> bool:
        """Return whether block `block` (0 <= block < num_layers) is a mixture of experts."""
        return self.num_experts > 0 and block >= self.first_k_dense

    @property
    def depth(self) -> int:
        """The number of layers that run: blocks times their repeats."""
        return self.num_layers * self.layer_sharing

    def window(self, layer: int) -> int:
        """Return how many positions layer `layer` (0 <= layer < depth) sees, its own included; 0 means all."""
        return self.sliding_window if layer % self.full_attention_interval else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and their values, as in a checkpoint's config.json."""
        return asdict(self)
