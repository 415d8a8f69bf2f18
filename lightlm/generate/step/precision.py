"""The precision in which a model decodes the fastest on this CPU, measured once and remembered.

Shapes: D features in, F features out.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightlm.generate.step.measured import measured_once
from lightlm.generate.step.native import library
from lightlm.generate.step.program import multiplication
from lightlm.model.products import prepared
from lightlm.model.transformer import Transformer

# A model below this size takes float32, which is more exact: its weights fit into the caches of a CPU.
_SMALL = 10_000_000
_MEASURED = 16_000_000  # weights that are multiplied: 64 MB in float32, more than most caches hold
_ROUNDS, _HOPELESS = 7, 4.0
_LEAST_GAIN = 1.1  # bfloat16 must be this much faster


def decoding_dtype(model: Transformer) -> torch.dtype:
    """Return float32, or bfloat16 if reading this model's weights for one token is faster with it on this CPU.

    The first call for a shape and a machine measures for some 0.2 s. The answer is remembered, so that the same command
    with the same seed gives the same text again.
    """
    if sum(p.numel() for p in model.parameters()) < _SMALL:
        return torch.float32

    def measure() -> str:
        return "bfloat16" if bf16_gain(model) >= _LEAST_GAIN else "float32"

    shape = sorted(model.config.to_dict().items())
    known = measured_once(shape, measure, lambda value: value in ("bfloat16", "float32"))
    return torch.bfloat16 if known == "bfloat16" else torch.float32


@torch.no_grad()
def bf16_gain(model: Transformer) -> float:
    """Return how many times as fast as in float32 weights of this model multiply one token in bfloat16.

    The precisions take turns and the fastest round of each counts, so that a busy core slows neither.
    """
    weights = list(_weights(model))
    runs = {dtype: _pass(weights, dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(runs, math.inf)
    for _ in range(_ROUNDS):
        for dtype, run in runs.items():
            started = time.perf_counter()
            run()
            best[dtype] = min(best[dtype], time.perf_counter() - started)
        if best[torch.bfloat16] > _HOPELESS * best[torch.float32]:
            break
    return best[torch.float32] / best[torch.bfloat16]


def _weights(model: Transformer) -> Iterator[Tensor]:
    """Yield matrices (F, D) of the blocks, the first ones, until there are enough."""
    stacks = (p.detach().flatten(0, -3) if p.ndim > 2 else p.detach()[None] for p in model.blocks.parameters())
    total = 0
    for weight_FD in itertools.chain.from_iterable(stack for stack in stacks if stack.ndim == 3):
        yield weight_FD
        total += weight_FD.numel()
        if total >= _MEASURED:
            return


def _pass(weights: list[Tensor], dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that multiplies one token by each weight."""
    cast = [weight_FD.to(dtype) for weight_FD in weights]
    if library() is not None and cast[0].device.type == "cpu":
        return multiplication(cast)
    products = [(prepared(weight_FD), weight_FD.new_ones(1, weight_FD.shape[1])) for weight_FD in cast]

    def run() -> None:
        for product, x_1D in products:
            product(x_1D)

    return run
