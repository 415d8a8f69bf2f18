"""Cost of fresh memory: allocate and fill a (50257, 576) fp32 tensor repeatedly, with and without `keep_freed_memory`.

    python benchmarks/allocation.py

Prints milliseconds and page faults per tensor for both, each measured in its own process (Linux and macOS).
"""

import multiprocessing
import resource

import torch
from common import make_parser
from measure import GPT2_VOCABULARY, seconds_of

from lightlm.device import keep_freed_memory

SHAPE = (GPT2_VOCABULARY, 576)  # the embedding of the recipe `lightlm`: 116 MB
WARM_UP, REPEATS = 2, 50


def page_faults() -> int:
    """Return the page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(kept: bool) -> None:
    """Print the cost per tensor."""
    if kept:
        keep_freed_memory()
    for _ in range(WARM_UP):
        torch.empty(SHAPE).fill_(1.0)
    before = page_faults()
    seconds = sum(seconds_of(lambda: torch.empty(SHAPE).fill_(1.0)) for _ in range(REPEATS))
    faults = page_faults() - before
    print(
        f"{'with' if kept else 'without'} keep_freed_memory: {1000 * seconds / REPEATS:.1f} ms per tensor, "
        f"{faults / REPEATS:,.0f} page faults per tensor"
    )


if __name__ == "__main__":
    make_parser(__doc__).parse_args()
    context = multiprocessing.get_context("spawn")
    for kept in (False, True):
        process = context.Process(target=measure, args=(kept,))
        process.start()
        process.join()
