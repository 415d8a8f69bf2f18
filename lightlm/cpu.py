"""What a CPU is best at, found by measurement: the precision of its matrix products.

Shapes: N rows, D features in, F features out.
"""

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

_ROWS, _ROUNDS = 128, 5
WIDTH = 512  # features of a product whose model is not known; and the most that are measured
# A bf16 product must be this much faster than an fp32 one. docs/decisions/fused-cpu-layers.md has the steps of whole
# models: bf16 wins each that it wins by products. Near a draw fp32 is taken, which is more exact.
_LEAST_GAIN = 1.1
# A CPU without any bf16 instructions may take 100 times as long (oneDNN's reference code on AVX2): one try is enough.
_HOPELESS = 4.0


@functools.cache
def bf16_gain(width: int = WIDTH) -> float:
    """Return how many times as fast as in fp32 this CPU multiplies in bf16: (N, D) x (D, 3 D), and both gradients.

    Takes some 40 ms at 512 features on one core of an AMD EPYC. The precisions take turns, and the fastest round of
    each counts, so that a busy core slows neither.
    """
    width = min(width, WIDTH)
    x_ND, weight_FD, grad_NF = torch.ones(_ROWS, width), torch.ones(3 * width, width), torch.ones(_ROWS, 3 * width)
    products = {dtype: _products(dtype, x_ND, weight_FD, grad_NF) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(products, math.inf)
    for round_number in range(_ROUNDS + 1):
        for dtype, run in products.items():
            started = time.perf_counter()
            run()
            if round_number:  # the first call of a shape builds its kernel
                best[dtype] = min(best[dtype], time.perf_counter() - started)
        if best[torch.bfloat16] > _HOPELESS * best[torch.float32]:
            break
    return best[torch.float32] / best[torch.bfloat16]


def _products(dtype: torch.dtype, x_ND: Tensor, weight_FD: Tensor, grad_NF: Tensor) -> Callable[[], None]:
    x, weight, grad = (part.to(dtype) for part in (x_ND, weight_FD, grad_NF))

    def run() -> None:
        torch.mm(x, weight.T)
        torch.mm(grad, weight)
        torch.mm(grad.T, x)

    return run


def has_fast_bf16(width: int = WIDTH) -> bool:
    """Return whether training and inference are faster in bf16 on this CPU."""
    return bf16_gain(width) >= _LEAST_GAIN
