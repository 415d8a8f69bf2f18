"""What fresh memory costs: allocating and filling a (50257, 576) fp32 tensor again and again, with and without
`device.keep_freed_memory`, each in a process of its own. Prints seconds and page faults (Linux and macOS).

python benchmarks/allocation.py
"""

import multiprocessing
import resource
import time

import torch

from lightlm.device import keep_freed_memory

SHAPE = (50_257, 576)  # of GPT-2's vocabulary and `lightlm`'s width: 116 MB
WARM_UP, REPEATS = 2, 50


def measure(kept: bool) -> None:
    if kept:
        keep_freed_memory()
    for _ in range(WARM_UP):
        torch.empty(SHAPE).fill_(1.0)
    faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(REPEATS):
        torch.empty(SHAPE).fill_(1.0)
    seconds = time.perf_counter() - started
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(
        f"{'with' if kept else 'without'} keep_freed_memory: {1000 * seconds / REPEATS:.1f} ms a tensor, "
        f"{faults / REPEATS:,.0f} page faults"
    )


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    for kept in (False, True):
        process = context.Process(target=measure, args=(kept,))
        process.start()
        process.join()
