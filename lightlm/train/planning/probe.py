"""A few real training steps on random tokens, in a process of their own: what a step takes in time and memory.

The process's peak memory is then the probe's alone, and goes back to the system with it. No run folder is touched,
and no data is needed: what a step costs does not depend on what the tokens say.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightlm.data.loader import BatchLoader
from lightlm.data.shards import TokenStream
from lightlm.device import autocast, keep_freed_memory, pick_device, pick_dtype
from lightlm.errors import LightLMError
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe, parse_recipe
from lightlm.train.distributed import World
from lightlm.train.observe.metrics import peak_memory
from lightlm.train.observe.observers import Observer
from lightlm.train.optim.optimizers import build_optimizer
from lightlm.train.step.compilation import compiles
from lightlm.train.step.gradients import Gradients, micro_batch_size
from lightlm.train.step.parallel import ParallelLoss
from lightlm.train.step.routers import router_losses

_WARM_UP, _TIMED = 2, 3  # on a CPU the first two steps fault their memory in; on a GPU the first may compile


class ProbeError(LightLMError):
    """The probe could not be run to its end."""


@dataclass(frozen=True)
class Probe:
    """What one process measured. Times are seconds, medians of the timed steps."""

    micro_batch: int  # sequences; fewer than planned if that many did not fit
    pass_seconds: float  # forward and backward of a micro-batch
    update_seconds: float  # clipping and the optimizer, once a step
    forward_seconds: float  # of a micro-batch, as in validation
    memory: int | None  # bytes at the peak; see metrics.peak_memory
    process_memory: int | None  # bytes before there was this model: Python, torch, and what a first step loads


def run_probe(recipe: Recipe) -> Probe:
    """Probe a recipe, whose vocabulary must be set, on its device.

    Raises:
        ProbeError: the steps do not fit into memory, or failed; the message says why.
    """
    done = subprocess.run(
        [sys.executable, "-m", "lightlm.train.planning.probe"],
        input=json.dumps(recipe.to_dict()),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed, as systems do when memory runs out"])[-1]
        raise ProbeError(f"the probe ended with exit code {done.returncode}: {last}")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def process_memory() -> int | None:
    """Peak bytes of this process after a training step of a model of almost no size, on the CPU.

    Importing torch is not all: code is read, products are compiled and modules are imported at the first step, about
    100 MB in torch 2.13.
    """
    smallest = {
        "name": "smallest",
        "model": {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "max_seq_len": 64, "vocab_size": 64},
        "data": {"dataset": "none"},
        "train": {"tokens": 64, "batch_tokens": 64, "device": "cpu", "compile": False},
        "optimizer": {"lr": 1e-3},
    }
    _measure(parse_recipe(smallest, "the smallest recipe"))
    return peak_memory(torch.device("cpu"))


def _measure(recipe: Recipe) -> tuple[int, float, float, float, int | None]:
    """In this process: micro-batch; seconds of a pass, of an update, and of a forward pass; peak memory."""
    device = pick_device(recipe.train.device)
    dtype = pick_dtype(recipe.train.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(recipe.train.seed)
    model = Transformer(recipe.model).to(device)
    world = World()
    model.recompute_blocks = recipe.train.activation_checkpointing
    loss = ParallelLoss(
        model,
        world,
        strategy="ddp",
        compiled=compiles(recipe, model, device),
        device=device,
        dtype=dtype,
        router_losses=router_losses(recipe),
    )
    optimizer = build_optimizer(model, recipe.optimizer, dtype)
    planned = micro_batch_size(recipe, device)
    gradients = Gradients(
        loss,
        _random_tokens(recipe, planned),
        world,
        Observer(),
        micro_batch=planned,
        adjustable=recipe.train.micro_batch_size == "auto",
        clip=recipe.train.grad_clip,
        device=device,
        dtype=dtype,
    )
    pass_seconds, update_seconds = _steps(gradients, model, optimizer, device, recipe)
    inputs, targets = _random_tokens(recipe, planned).batch(0, gradients.micro_batch)
    forward = _validation_pass(loss, inputs.to(device), targets.to(device), device, dtype)
    forward_seconds = [_seconds(forward, device) for _ in range(2)][-1]
    return gradients.micro_batch, pass_seconds, update_seconds, forward_seconds, peak_memory(device)


def _steps(
    gradients: Gradients,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    recipe: Recipe,
) -> tuple[float, float]:
    """(seconds of a micro-batch, seconds of clipping and the optimizer)."""
    parameters, clip = list(model.parameters()), recipe.train.grad_clip or float("inf")
    passes, clips, updates = [], [], []
    for _ in range(_WARM_UP + _TIMED):
        # One micro-batch as a batch of its own; it is clipped, too.
        both = _seconds(lambda: gradients(0, gradients.micro_batch, threading.Event()), device)
        clips.append(_seconds(lambda: torch.nn.utils.clip_grad_norm_(parameters, clip), device))
        passes.append(both - clips[-1])
        updates.append(_seconds(optimizer.step, device))
        if gradients.passes(recipe.batch_sequences) == 1:
            # Otherwise a pass finds gradients to add to, as most passes of a longer step do.
            optimizer.zero_grad(set_to_none=True)
    timed = slice(_WARM_UP, None)
    return statistics.median(passes[timed]), statistics.median(clips[timed]) + statistics.median(updates[timed])


def _validation_pass(
    loss: ParallelLoss, inputs_BT: Tensor, targets_BT: Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    @torch.no_grad()
    def forward() -> None:
        with autocast(device, dtype):
            loss.evaluate(inputs_BT, targets_BT)

    return forward


def _random_tokens(recipe: Recipe, sequences: int) -> BatchLoader:
    generator = np.random.default_rng(recipe.train.seed)
    tokens = generator.integers(recipe.model.vocab_size, size=sequences * recipe.seq_len + 1)
    return BatchLoader(TokenStream([tokens], 0), recipe.seq_len, recipe.train.seed)


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    started = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    # What a run has in memory too, so that the base is a run's.
    import lightlm.train.trainer  # noqa: F401

    try:
        base = process_memory()
        print(json.dumps(asdict(Probe(*_measure(parse_recipe(json.load(sys.stdin), "standard input")), base))))
    except (LightLMError, torch.OutOfMemoryError, MemoryError) as error:
        sys.exit(f"{error}")
