"""The section `moe`: training of the routers."""

from typing import Annotated

from pydantic import Field

from lightlm.recipe.sections.section import Section


class MoESection(Section):
    bias_update_rate: Annotated[float, Field(ge=0)] | None = None
    """Change of a selection bias per step, with router sigmoid. null takes 0.001 (DeepSeek-V3's); runs of a few hundred
    steps want 0.01."""
    balance_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Coefficient of the balance loss, which is 1 for a balanced layer, summed over layers. null takes 1e-4 with router
    sigmoid, within each sequence (DeepSeek-V3), and 1e-2 with softmax, over a forward pass (Switch Transformer)."""
    z_loss_coef: float = Field(default=0.0, ge=0)
    """Coefficient of mean(logsumexp(router logits)^2). ST-MoE uses 1e-3 (arXiv 2202.08906)."""
