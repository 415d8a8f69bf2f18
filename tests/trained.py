"""Tiny models after some steps of training, so that no parameter has its first value."""

from dataclasses import replace

import torch

from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.optim.registry import read_section
from lightlm.train.step.loss import token_loss


def train(config, steps=5, **settings):
    """A model after steps of AdamW, at rates large enough for multipliers to move by a tenth."""
    torch.manual_seed(0)
    model = Transformer(replace(config, init_std=0.2))
    section = read_section({"name": "adamw", "lr": 0.02, "scalar_lr": 0.05, **settings})
    optimizer = build_optimizer(model, section, torch.float32)
    batches = torch.randint(model.config.vocab_size, (steps, 2, 4, 17))
    for inputs, targets in batches[..., :-1].contiguous():
        token_loss(model, inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
