"""NorMuon (arXiv 2510.05491); its arithmetic is in `orthogonal.py`."""

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lightlm.optim.muon import MuonSettings
from lightlm.optim.section import MATRICES, Shape, Share

if TYPE_CHECKING:
    import torch


class NorMuonSection(MuonSettings):
    """NorMuon for the matrices in the blocks and AdamW for the rest."""

    name: Literal["normuon"] = Field(
        default="normuon",
        description="Muon with updates of about equal size in each neuron (a row), and AdamW for all other parameters "
        "(arXiv 2510.05491).",
    )
    neuron_beta2: Share = Field(
        default=0.95, description="Share that a step keeps of each neuron's mean squared update (the authors')."
    )

    def build(self, groups: list[dict[str, Any]], dtype: "torch.dtype") -> "torch.optim.Optimizer":
        from lightlm.optim.orthogonal import NorMuon

        return NorMuon(**self.muon_arguments(groups, dtype), beta2=self.neuron_beta2)

    def state_bytes(self, group: str, shape: Shape) -> int:
        rows = 4 * math.prod(shape[:-1]) if group == MATRICES else 0  # one second moment per row in fp32
        return super().state_bytes(group, shape) + rows
