"""Random generators and the model's mode, kept unchanged by an evaluation during training."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from lightlm.model.transformer import Transformer


@contextlib.contextmanager
def preserved(model: Transformer) -> Iterator[None]:
    """Restore the model's mode and every random generator afterwards: lm-eval seeds Python's, numpy's and torch's."""
    training, device = model.training, model.device
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Each accelerator's module (torch.cuda, torch.mps) has these two functions.
    module = None if device.type == "cpu" else torch.get_device_module(device)
    accelerator = module.get_rng_state() if module else None
    try:
        yield
    finally:
        model.train(training)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if module:
            module.set_rng_state(accelerator)
