"""AdamW (arXiv 1711.05101)."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lightlm.optim.section import NO_EFFECT, OptimizerSection, Problem, Share

if TYPE_CHECKING:
    import torch

ADAMW_BYTES = 8  # per parameter: two moments in fp32


class AdamWSettings(OptimizerSection):
    """Settings of AdamW, also for optimizers that leave some groups to it."""

    cautious: bool = Field(
        default=False, description="Decay a weight only in steps whose update also shrinks it (arXiv 2510.12402)."
    )
    betas: tuple[Share, Share] = Field(
        default=(0.9, 0.95), description="AdamW's decay rates of the two moments (GPT-3's)."
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's number added to the denominator (GPT-3's).")

    def build_adamw(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """Return AdamW for these groups."""
        import torch

        from lightlm.optim.cautious import CautiousAdamW

        adamw = CautiousAdamW if self.cautious else torch.optim.AdamW
        return adamw(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def problems(self) -> list[Problem]:
        if self.cautious and not (self.weight_decay or self.embedding_weight_decay):
            return [("cautious", f"{NO_EFFECT} without weight_decay; leave it out")]
        return []


class AdamWSection(AdamWSettings):
    """AdamW for all parameters."""

    name: Literal["adamw"] = Field(default="adamw", description="AdamW for all parameters.")

    def build(self, groups: list[dict[str, Any]], dtype: "torch.dtype") -> "torch.optim.Optimizer":
        return self.build_adamw(groups)

    def state_bytes(self, group: str) -> int:
        return ADAMW_BYTES
