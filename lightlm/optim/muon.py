"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/, 2024); its arithmetic is in `orthogonal.py`."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lightlm.optim.adamw import ADAMW_BYTES, AdamWSettings
from lightlm.optim.section import Problem, Share

if TYPE_CHECKING:
    import torch

_MATRICES = "matrices"


class MuonSection(AdamWSettings):
    """Muon for the matrices in the blocks and AdamW for the rest."""

    name: Literal["muon"] = Field(
        default="muon", description="Muon for the matrices in the blocks, and AdamW for all other parameters."
    )
    momentum: Share = Field(default=0.95, description="Muon's momentum (Keller Jordan's and torch.optim.Muon's).")
    nesterov: bool = Field(default=True, description="Use Nesterov momentum in Muon.")
    ns_steps: int = Field(default=5, ge=1, le=20, description="Newton-Schulz iterations per Muon update.")
    update_scale: Literal["match_rms_adamw", "original"] = Field(
        default="match_rms_adamw",
        description="`match_rms_adamw` gives Muon's updates the size of AdamW's, so one lr serves both (arXiv "
        "2502.16982). `original` is Keller Jordan's scale, with lr about 0.02 and rates of their own for the rest.",
    )

    def build(self, groups: list[dict[str, Any]], dtype: "torch.dtype") -> "torch.optim.Optimizer":
        from lightlm.optim.orthogonal import Muon

        return Muon(
            [group for group in groups if group["name"] == _MATRICES],
            self.build_adamw([group for group in groups if group["name"] != _MATRICES]),
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            scale_rule=self.update_scale,
            cautious=self.cautious,
            dtype=dtype,
        )

    def state_bytes(self, group: str) -> int:
        return 4 if group == _MATRICES else ADAMW_BYTES  # one momentum in fp32

    def model_problems(self, *, tied: bool) -> list[Problem]:
        found = super().model_problems(tied=tied)
        if self.update_scale == "match_rms_adamw":
            return found
        missing = f"is missing: with update_scale=original lr {self.lr:g} is not a rate for AdamW"
        keys = ("embedding_lr", "scalar_lr") if tied else ("embedding_lr", "head_lr", "scalar_lr")
        return found + [(key, missing) for key in keys if getattr(self, key) is None]
