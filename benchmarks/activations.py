"""Bytes that autograd keeps of one token and layer in mixed precision, beside `activation_bytes`' estimate.

python benchmarks/activations.py
"""

from dataclasses import replace

import torch

from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe
from lightlm.train.gradients import activation_bytes

TOKENS = 256


def saved_bytes(model: Transformer, tokens_BT: torch.Tensor) -> int:
    """Storage of all tensors saved for backward, weights and their casts left out."""
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = model.hidden_states(tokens_BT)
    return sum(storages.values()) if output.requires_grad else 0


if __name__ == "__main__":
    for name in ("lightlm", "gpt2-124m", "mobilellm-125m"):
        # Two layers less one layer leave out what is kept once a model.
        config = replace(load_recipe(name).model, vocab_size=1000)
        sizes = [
            saved_bytes(Transformer(replace(config, num_layers=layers)), torch.randint(1000, (1, TOKENS)))
            for layers in (1, 2)
        ]
        estimate = activation_bytes(replace(config, num_layers=1))
        print(
            f"{name}: {(sizes[1] - sizes[0]) / TOKENS / 1e3:.1f} KB a token and layer, estimate {estimate / 1e3:.1f} KB"
        )
