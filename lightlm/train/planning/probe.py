"""A few real training steps on random tokens, in a process of their own: the time and memory of a step.

The process's peak memory is then only the probe's, and returns to the system when it ends. It needs no data and makes
no run folder.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from lightlm.device import autocast
from lightlm.errors import LightLMError, is_out_of_memory
from lightlm.processes import python_command, python_environment
from lightlm.recipe import Recipe, parse_recipe
from lightlm.train.observe.metrics import peak_memory
from lightlm.train.setup import set_up

_WARM_UP, _TIMED = 2, 3  # steps; on a CPU the first two fault their memory in, on a GPU the first may compile


class ProbeError(LightLMError):
    """The probe failed."""


@dataclass(frozen=True)
class Probe:
    """Measurements of one process. Times are seconds, medians of the timed steps."""

    micro_batch: int  # sequences; fewer than planned if that many did not fit
    pass_seconds: float  # forward and backward of a micro-batch
    update_seconds: float  # clipping and the optimizer, once per step
    forward_seconds: float  # a micro-batch, as in validation
    memory: int | None  # bytes at the peak; see metrics.peak_memory
    process_memory: int | None  # bytes before this model exists: Python, torch, and what a first step loads

    def training_seconds(self, recipe: Recipe, tokens: int, steps: int) -> float:
        """Return the time of training; passes take time in proportion to their tokens."""
        return tokens / (self.micro_batch * recipe.seq_len) * self.pass_seconds + steps * self.update_seconds

    def validation_seconds(self, recipe: Recipe, tokens: int) -> float:
        return tokens / (self.micro_batch * recipe.seq_len) * self.forward_seconds


def run_probe(recipe: Recipe) -> Probe:
    """Probe a recipe, whose vocabulary must be set, on its device.

    Raises:
        ProbeError: the steps failed or do not fit into memory; the message says why.
    """
    done = subprocess.run(
        python_command("-m", "lightlm.train.planning.probe"),
        input=json.dumps(recipe.to_dict()),
        env=python_environment() | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["the system killed it, as it does when memory runs out"])[-1]
        raise ProbeError(f"the probe ended with exit code {done.returncode}: {last}")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def process_memory() -> int | None:
    """Return the peak bytes of this process after a training step of a tiny model on the CPU.

    Importing torch is only a part: the first step reads code, compiles products and imports modules, about 100 MB in
    torch 2.13.
    """
    smallest = {
        "name": "smallest",
        "model": {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "max_seq_len": 64, "vocab_size": 64},
        "data": {"dataset": "none"},
        "train": {"tokens": 64, "batch_tokens": 64, "device": "cpu", "compile": False},
        "optimizer": {"lr": 1e-3},
    }
    return _measure(parse_recipe(smallest, "the smallest recipe"), None).memory


def _measure(recipe: Recipe, base: int | None) -> Probe:
    """Probe a recipe in this process, which took `base` bytes before."""
    setup = set_up(recipe, None, lambda message: None)
    gradients, optimizer, device = setup.gradients, setup.optimizer, setup.device
    parameters, clip = list(setup.model.parameters()), recipe.train.grad_clip or float("inf")
    passes, updates = [], []
    for _ in range(_WARM_UP + _TIMED):
        # One micro-batch as a batch of its own, which is also clipped.
        both = _seconds(lambda: gradients(0, gradients.micro_batch, threading.Event()), device)
        clipping = _seconds(lambda: torch.nn.utils.clip_grad_norm_(parameters, clip), device)
        passes.append(both - clipping)
        updates.append(clipping + _seconds(optimizer.step, device))
        if (average := setup.average) is not None:
            updates[-1] += _seconds(partial(average.update, 1, 1), device)
        if gradients.passes(recipe.batch_sequences) == 1:
            # Otherwise a pass adds to existing gradients, as most passes of a longer step do.
            optimizer.zero_grad(set_to_none=True)
    inputs, targets = (part.to(device) for part in setup.loader.batch(0, gradients.micro_batch))

    @torch.no_grad()
    def forward() -> None:
        with autocast(device, setup.dtype):
            setup.loss.evaluate(inputs, targets)

    forward_seconds = [_seconds(forward, device) for _ in range(2)][-1]
    pass_seconds, update_seconds = (statistics.median(times[_WARM_UP:]) for times in (passes, updates))
    memory = peak_memory(device)
    return Probe(gradients.micro_batch, pass_seconds, update_seconds, forward_seconds, memory, base)


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    started = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    try:
        base = process_memory()
        print(json.dumps(asdict(_measure(parse_recipe(json.load(sys.stdin), "standard input"), base))))
    except (LightLMError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        sys.exit(f"{error}")
