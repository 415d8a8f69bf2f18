"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/, 2024); its arithmetic is in `orthogonal.py`."""

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lightlm.optim.adamw import AdamWSettings
from lightlm.optim.section import MATRICES, NO_EFFECT, Problem, Shape, Share
from lightlm.quantities.types import Span, span_tokens

if TYPE_CHECKING:
    import torch


class MuonSettings(AdamWSettings):
    """Settings of Muon and its variants, which leave all but the matrices in the blocks to AdamW."""

    momentum: Share = Field(default=0.95, description="Muon's momentum (Keller Jordan's and torch.optim.Muon's).")
    momentum_start: Share | None = Field(
        default=None,
        description="Momentum of the first step, which rises linearly to momentum (nanochat: 0.85 to 0.97). null: no "
        "rise.",
    )
    momentum_warmup: Span = Field(default="10%", description="Length of the rise from momentum_start.")
    momentum_end: Share | None = Field(
        default=None,
        description="Momentum at the end of the learning rate's decay, along which it moves there linearly (nanochat: "
        "0.97 to 0.90). null: it stays.",
    )
    nesterov: bool = Field(default=True, description="Use Nesterov momentum in Muon.")
    orthogonalization: Literal["newton_schulz", "polar_express"] = Field(
        default="newton_schulz",
        description="Polynomials that orthogonalize an update. `newton_schulz` repeats Keller Jordan's. "
        "`polar_express` has another one per step, with singular values nearer to 1 at the same cost (arXiv "
        "2505.16932).",
    )
    ns_steps: int = Field(default=5, ge=1, le=20, description="Polynomials applied per Muon update.")
    update_scale: Literal["match_rms_adamw", "original"] = Field(
        default="match_rms_adamw",
        description="`match_rms_adamw` gives Muon's updates the size of AdamW's, so one lr serves both (arXiv "
        "2502.16982). `original` is Keller Jordan's scale, with lr about 0.02 and rates of their own for the rest.",
    )

    def muon_arguments(self, groups: list[dict[str, Any]], dtype: "torch.dtype") -> dict[str, Any]:
        """Return the arguments of `orthogonal.Muon`."""
        from lightlm.optim.orthogonal import polynomials

        return {
            "groups": [group | {"momentum": self.momentum} for group in groups if group["name"] == MATRICES],
            "others": self.build_adamw([group for group in groups if group["name"] != MATRICES]),
            "steps": polynomials(self.orthogonalization, self.ns_steps),
            "nesterov": self.nesterov,
            "scale_rule": self.update_scale,
            "cautious": self.cautious,
            "dtype": dtype,
        }

    def adamw_groups(self, *, tied: bool) -> list[str]:
        return [group for group in super().adamw_groups(tied=tied) if group != MATRICES]

    def momentum_at(self, tokens: float, total: int, decayed: float) -> float | None:
        if self.momentum_start is None and self.momentum_end is None:
            return None
        momentum, span = self.momentum, span_tokens(self.momentum_warmup, total)
        if self.momentum_start is not None and tokens < span:
            momentum = self.momentum_start + (momentum - self.momentum_start) * tokens / span
        return momentum if self.momentum_end is None else momentum + (self.momentum_end - momentum) * decayed

    def momentum_corners(self, total: int) -> list[int]:
        return [span_tokens(self.momentum_warmup, total)] if self.momentum_start is not None else []

    def state_bytes(self, group: str, shape: Shape) -> int:
        return 4 * math.prod(shape) if group == MATRICES else self.adamw_bytes(shape)  # one momentum in fp32

    def problems(self) -> list[Problem]:
        found = super().problems()
        default = type(self).model_fields["momentum_warmup"].default
        if self.momentum_start is None and self.momentum_warmup != default:
            found.append(("momentum_warmup", f"{NO_EFFECT} without momentum_start; leave it out"))
        if self.momentum_start is not None and span_tokens(self.momentum_warmup, 10**18) == 0:
            found.append(("momentum_start", f"{NO_EFFECT} with a momentum_warmup of 0; leave it out"))
        return found

    def model_problems(self, *, tied: bool) -> list[Problem]:
        found = super().model_problems(tied=tied)
        if self.update_scale == "match_rms_adamw":
            return found
        missing = f"is missing: with update_scale=original lr {self.lr:g} is not a rate for AdamW"
        keys = [f"{group}_lr" for group in self.adamw_groups(tied=tied)]
        return found + [(key, missing) for key in keys if getattr(self, key) is None]

    def run_problems(self, *, decays: bool, tokens: int) -> list[Problem]:
        found = super().run_problems(decays=decays, tokens=tokens)
        if self.momentum_end is not None and not decays:
            found.append(("momentum_end", f"{NO_EFFECT} without a decay of the learning rate; leave it out"))
        if self.momentum_start is not None and span_tokens(self.momentum_warmup, tokens) > tokens:
            message = f"{self.momentum_warmup} exceeds the run's {tokens:,} tokens; write a share: 10%"
            found.append(("momentum_warmup", message))
        return found


class MuonSection(MuonSettings):
    """Muon for the matrices in the blocks and AdamW for the rest."""

    name: Literal["muon"] = Field(
        default="muon", description="Muon for the matrices in the blocks, and AdamW for all other parameters."
    )

    def build(self, groups: list[dict[str, Any]], dtype: "torch.dtype") -> "torch.optim.Optimizer":
        from lightlm.optim.orthogonal import Muon

        return Muon(**self.muon_arguments(groups, dtype))
