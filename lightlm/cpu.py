"""What a CPU is best at, found by measurement: the precision of its matrix products, and the number of threads.

Shapes: N rows, D features in, F features out.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlm.limits import cores
from lightlm.model.products import product
from lightlm.processes import THREADS_VARIABLE

_ROWS, _ROUNDS = 128, 5
WIDTH = 512  # features of a product whose model is not known; and the most that are measured
# A bf16 product must be this much faster than an fp32 one: near a draw fp32 is taken, which is more exact.
_LEAST_GAIN = 1.1
# A CPU without bf16 instructions may take 100 times as long (oneDNN's reference code on AVX2): three tries are enough,
# and one is not, because another process may have had the core meanwhile.
_HOPELESS, _TRIES = 4.0, 3

_LAYER_ROWS = 512  # tokens of the layer that numbers of threads are measured with
_SLICE_SECONDS, _SLICES = 0.05, 8  # measured at a time, and how often, for each number of threads
FEW_SLICES = 3  # for commands that may take only seconds themselves
# Fewer threads must be this much faster: an idle machine, whose figures vary by some percent, keeps all of them.
_LEAST_THREADS_GAIN = 1.15


@functools.cache
def gain(dtype: torch.dtype, width: int = WIDTH) -> float:
    """Return how many times as fast as in fp32 this CPU multiplies in bf16 or fp16: (N, D) x (D, 3 D), both gradients.

    Takes some 40 ms at 512 features on one core of an AMD EPYC. The precisions take turns, and the fastest round of
    each counts, so that a busy core slows neither.
    """
    width = min(width, WIDTH)
    x_ND, weight_FD, grad_NF = torch.ones(_ROWS, width), torch.ones(3 * width, width), torch.ones(_ROWS, 3 * width)
    products = {each: _products(each, x_ND, weight_FD, grad_NF) for each in (torch.float32, dtype)}
    best = dict.fromkeys(products, math.inf)
    for round_number in range(_ROUNDS + 1):
        for each, run in products.items():
            started = time.perf_counter()
            run()
            if round_number:  # the first call of a shape builds its kernel
                best[each] = min(best[each], time.perf_counter() - started)
        if round_number >= _TRIES and best[dtype] > _HOPELESS * best[torch.float32]:
            break
    return best[torch.float32] / best[dtype]


def _products(dtype: torch.dtype, x_ND: Tensor, weight_FD: Tensor, grad_NF: Tensor) -> Callable[[], None]:
    x, weight, grad = (part.to(dtype) for part in (x_ND, weight_FD, grad_NF))

    def run() -> None:
        product(x, weight.T)
        product(grad, weight)
        product(grad.T, x)

    return run


def has_fast_bf16(width: int = WIDTH) -> bool:
    """Return whether training and inference are faster in bf16 on this CPU."""
    return gain(torch.bfloat16, width) >= _LEAST_GAIN


def use_threads(wanted: int | str, note: Callable[[str], None], width: int = WIDTH, slices: int = _SLICES) -> int:
    """Let torch compute with this many threads, and return the number that it uses.

    `OMP_NUM_THREADS` always wins. `auto` measures (`fastest_threads`), and so does a number above the cores that this
    process may use.

    Args:
        note: receives what differs from what was wanted, and why.
        width: the model's hidden size.
        slices: see `fastest_threads`.
    """
    if THREADS_VARIABLE in os.environ:
        given = torch.get_num_threads()
        if wanted not in ("auto", given):
            note(f"{THREADS_VARIABLE} sets {given} threads, not train.threads={wanted}; losses may differ by rounding")
        return given
    most = min(torch.get_num_threads(), cores())  # torch does not know of a limit on the time
    if wanted != "auto" and int(wanted) > cores():
        note(
            f"train.threads={wanted} exceeds the {cores()} cores that this process may use: choosing anew, so losses "
            "may differ by rounding"
        )
        wanted = "auto"
    threads = fastest_threads(most, width, slices) if wanted == "auto" else int(wanted)
    if wanted == "auto" and threads < most:
        note(
            f"computing with {threads} of {most} threads, which is faster now: the model is small, or other processes "
            f"use the cores; set {THREADS_VARIABLE} to decide yourself"
        )
    torch.set_num_threads(threads)
    return threads


def fastest_threads(most: int, width: int = WIDTH, slices: int = _SLICES) -> int:
    """Return the number of threads, at most `most`, that computes a layer of this width the fastest now.

    Takes `slices` times 50 ms for each candidate. With another process on a core, threads that share the work wait for
    the one that shares its core: then fewer are faster.
    """
    candidates = _candidates(most)
    if len(candidates) == 1:
        return most
    layer = _layer(min(width, WIDTH))
    seconds, calls = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0)
    try:
        for _ in range(slices):
            for threads in candidates:
                torch.set_num_threads(threads)
                layer()  # starts the threads
                started = time.perf_counter()
                while (taken := time.perf_counter() - started) < _SLICE_SECONDS:
                    layer()
                    calls[threads] += 1
                seconds[threads] += taken
    finally:
        torch.set_num_threads(most)
    # The mean, not the fastest round: what other processes take away is what is measured.
    speeds = {threads: calls[threads] / seconds[threads] for threads in candidates}
    fewer = max(speeds, key=lambda threads: speeds[threads])
    return fewer if speeds[fewer] >= _LEAST_THREADS_GAIN * speeds[most] else most


def _candidates(most: int) -> list[int]:
    """Return all threads, one and two fewer, and halves: 16, 15, 14, 8, 4, 2, 1."""
    halves = [most >> shift for shift in range(1, most.bit_length())]
    return sorted({most, *(n for n in (most - 1, most - 2) if n > 0), *halves}, reverse=True)


def _layer(width: int) -> Callable[[], None]:
    """Return a function that computes a feed-forward layer on (512, D)."""
    x_ND, up_FD, down_DF = torch.ones(_LAYER_ROWS, width), torch.ones(3 * width, width), torch.ones(width, 3 * width)

    def run() -> None:
        product(F.silu(product(x_ND, up_FD.T)), down_DF.T).add_(x_ND)

    return run


@contextlib.contextmanager
def restored_threads() -> Iterator[None]:
    """Context manager that restores torch's number of threads, which is one for the whole process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
