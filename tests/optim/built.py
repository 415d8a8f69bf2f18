"""An optimizer from settings as a recipe gives them."""

import torch

from lightlm.optim.groups import build_optimizer
from lightlm.optim.registry import read_section


def optimizer_for(model, **settings):
    """The optimizer that the section `optimizer` with these settings makes for a float32 run."""
    return build_optimizer(model, read_section(settings), torch.float32)
