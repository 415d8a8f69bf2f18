"""AdamW (arXiv 1711.05101)."""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from lightlm.optim.section import MATRICES, NO_EFFECT, OptimizerSection, Problem, Shape, Share
from lightlm.quantities.types import Tokens

if TYPE_CHECKING:
    import torch

_BYTES = 8  # per parameter: two moments in fp32
_BETAS = (0.9, 0.95)
Betas = tuple[Share, Share | None]


class AdamWSettings(OptimizerSection):
    """Settings of AdamW, also for optimizers that leave some groups to it."""

    cautious: bool = Field(
        default=False, description="Decay a weight only in steps whose update also shrinks it (arXiv 2510.12402)."
    )
    betas: Betas = Field(
        default=_BETAS,
        description="AdamW's decay rates of the two moments (GPT-3's). The second may be null with beta2_half_life, "
        "and is unless given.",
    )
    embedding_betas: Betas | None = Field(
        default=None, description="betas of the token and position tables, and of a tied head. null takes betas."
    )
    head_betas: Betas | None = Field(default=None, description="betas of an untied output head. null takes betas.")
    scalar_betas: Betas | None = Field(
        default=None, description="betas of norms, biases, multipliers and residual scales. null takes betas."
    )
    beta2_half_life: Annotated[Tokens, Field(gt=0, le=10**15)] | None = Field(
        default=None,
        description="Tokens after which a squared gradient counts half in the second moment, where a beta2 is null: "
        "beta2 = 0.5 ** (tokens of the step's batch / beta2_half_life). It keeps its meaning in any batch size (arXiv "
        "2507.07101). null: beta2 is a number per step.",
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's number added to the denominator (GPT-3's).")

    @model_validator(mode="before")
    @classmethod
    def _leave_beta2_to_the_half_life(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("beta2_half_life") is not None and "betas" not in values:
            return values | {"betas": (_BETAS[0], None)}
        return values

    def build_adamw(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """Return AdamW for these groups."""
        import torch

        from lightlm.optim.variable_adamw import VariableAdamW

        groups = [
            {**group, **self._moments(group["name"]), "eps": self.eps * group.get("eps_factor", 1.0)}
            for group in groups
        ]
        common: dict[str, Any] = {"lr": self.lr, "fused": True}
        if self.cautious or self.beta2_half_life:
            return VariableAdamW(groups, cautious=self.cautious, **common)
        return torch.optim.AdamW(groups, **common)

    def _moments(self, group: str) -> dict[str, Any]:
        key = "scalar_betas" if group == "multipliers" else f"{group}_betas"
        beta1, beta2 = getattr(self, key, None) or self.betas
        if beta2 is not None:
            return {"betas": (beta1, beta2)}
        return {"betas": (beta1, _BETAS[1]), "beta2_half_life": self.beta2_half_life}  # set anew before each step

    def adamw_bytes(self, shape: Shape) -> int:
        """Return the bytes of AdamW's state of one parameter."""
        return _BYTES * math.prod(shape)

    def adamw_groups(self, *, tied: bool) -> list[str]:
        """Return the parameter groups that AdamW updates."""
        return [MATRICES, "embedding", "scalar"] + ([] if tied else ["head"])

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.cautious and not self.decays:
            found.append(("cautious", f"{NO_EFFECT} without weight_decay; leave it out"))
        return found

    def model_problems(self, *, tied: bool) -> list[Problem]:
        found = super().model_problems(tied=tied)
        if tied and self.head_betas is not None:
            message = f"{NO_EFFECT} with model.tie_embeddings; embedding_betas are those of the shared table"
            found.append(("head_betas", message))
        keys = [f"{group}_betas" for group in self.adamw_groups(tied=tied)]
        used = {key if getattr(self, key, None) else "betas" for key in keys}
        half_life = self.beta2_half_life is not None
        open_keys = [key for key in sorted(used) if getattr(self, key)[1] is None]
        if not half_life:
            missing = "has a null beta2; write a number such as 0.95, or set beta2_half_life"
            found += [(key, missing) for key in open_keys]
        elif not open_keys:
            fixed = ", ".join(f"{key}={list(getattr(self, key))}" for key in sorted(used))
            found.append(("beta2_half_life", f"{NO_EFFECT} with {fixed}; write null for a beta2 that follows it"))
        if "betas" not in used and self.betas not in (_BETAS, (_BETAS[0], None)):
            found.append(("betas", f"{NO_EFFECT} with {', '.join(sorted(used))}; leave it out"))
        return found


class AdamWSection(AdamWSettings):
    """AdamW for all parameters."""

    name: Literal["adamw"] = Field(default="adamw", description="AdamW for all parameters.")

    def build(self, groups: list[dict[str, Any]], dtype: "torch.dtype") -> "torch.optim.Optimizer":
        return self.build_adamw(groups)

    def state_bytes(self, group: str, shape: Shape) -> int:
        return self.adamw_bytes(shape)
