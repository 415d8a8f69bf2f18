"""A contest in training speed: each contestant trains in its own process, and they take their steps in turn.

Own processes keep allocator settings and peak memory apart. Taking turns lets a busy moment of the machine slow all
contestants alike. train.py and moe.py name the contestants.
"""

import argparse
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import make_parser
from measure import dense_config, dtype_name, load_shape, machine_facts, seconds_of
from torch import Tensor

from lightlm.data.folder import DataFolder
from lightlm.data.loader import BatchLoader
from lightlm.device import autocast, keep_freed_memory, peak_flops, pick_device, pick_dtype
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.recipe import Recipe
from lightlm.train.observe.metrics import peak_memory
from lightlm.train.step.parallel import LossModule, MicroBatch
from lightlm.train.step.routers import router_losses

WARM_UP = 4  # rounds that are not counted: the first steps fault in their memory and compile

# The model, its mean loss of tokens (B, T + 1), and its optimizer.
Contestant = tuple[Any, Callable[[Tensor], Tensor], torch.optim.Optimizer]
# Makes a contestant from the options, the device and the second word of its name, such as "compiled".
Builder = Callable[[argparse.Namespace, torch.device, str], Contestant]


def contest_parser(description: str | None, recipe: str, contestants: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every contest."""
    parser = make_parser(description)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--data", type=Path, help="a prepared folder; random tokens unless given")
    parser.add_argument("--contestants", default=contestants, help="names; 'NAME compiled' for torch.compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    return parser


def shape(options: argparse.Namespace, *, dense: bool = False) -> tuple[Recipe, ModelConfig]:
    """Return the recipe and the model's shape, without learned scales, which the other contestants do not have.

    Args:
        dense: replace experts by a dense network of the active size.
    """
    recipe, config = load_shape(options.recipe, options.overrides, positions=options.length + 1)
    config = dense_config(config.folded()) if dense else config.folded()
    return recipe.model_copy(update={"model": config}), config


def lightlm(options: argparse.Namespace, device: torch.device, suffix: str, *, dense: bool = False) -> Contestant:
    """Return LightLM's own model."""
    recipe, config = shape(options, dense=dense)
    if device.type == "cpu":
        keep_freed_memory()
    model = Transformer(config).to(device)
    loss = LossModule(model, router_losses(recipe))
    if suffix == "compiled":
        model.compile_blocks() if device.type == "cpu" else loss.compile()

    def mean_loss(tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:].contiguous()
        return loss(MicroBatch(tokens[:, :-1], targets)).objective / targets.numel()

    return model, mean_loss, build_optimizer(model, recipe.optimizer, pick_dtype(options.dtype, device))


def batches_of(options: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    """Yield endless batches (B, T + 1): of prepared data if given, else of random tokens."""
    shape_BT = options.sequences, options.length + 1
    if options.data is None:
        _, config = shape(options)
        while True:
            yield torch.randint(config.vocab_size, shape_BT, device=device)
    loader = BatchLoader({"data": DataFolder.open(options.data).split("train")}, options.length, 0)
    for start in itertools.count(0, options.sequences):
        inputs, targets = loader.batch(start, options.sequences)
        yield torch.cat([inputs, targets[:, -1:]], dim=1).to(device)


def run_contestant(builder: Builder, suffix: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Run one contestant's process: answer each message with the seconds of a step, the last with the peak memory."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    torch.manual_seed(0)
    model, loss, optimizer = builder(options, device, suffix)
    batches = batches_of(options, device)

    def step(tokens: Tensor) -> None:
        with autocast(device, dtype):
            value = loss(tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()

    while pipe.recv():
        tokens = next(batches)
        pipe.send(seconds_of(lambda tokens=tokens: step(tokens), device))
    pipe.send(peak_memory(device))


def compete(
    options: argparse.Namespace, builders: dict[str, Builder]
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Return the seconds of each contestant's steps, and its peak memory in bytes.

    Args:
        builders: by the first word of a contestant's name.
    """
    # Measured once: processes that start at the same time disturb each other's measurement.
    options.dtype = dtype_name(pick_dtype(options.dtype, pick_device(options.device)))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pipes: dict[str, Connection] = {}
    for name in options.contestants.split(","):
        base, _, suffix = name.partition(" ")
        pipes[name], theirs = context.Pipe()
        context.Process(target=run_contestant, args=(builders[base], suffix, options, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for round_number in range(WARM_UP + options.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken = pipe.recv()
            if round_number >= WARM_UP:
                seconds[name].append(taken)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        peaks[name] = pipe.recv()
    return seconds, peaks


def summary(
    options: argparse.Namespace, seconds: dict[str, list[float]], peaks: dict[str, int | None]
) -> dict[str, Any]:
    """Return speeds, their ratios to LightLM's, peak memory, and the facts of the machine."""
    device = pick_device(options.device)
    count = options.sequences * options.length
    contestants = {}
    for name, times in seconds.items():
        speeds = [count / second for second in times]
        contestants[name] = {
            "tokens_per_second": round(statistics.median(speeds)),
            "slowest": round(min(speeds)),
            "fastest": round(max(speeds)),
            "peak_memory_gb": round((peaks[name] or 0) / 1e9, 2),
        }
    best = {
        base: max(entry["tokens_per_second"] for name, entry in contestants.items() if name.split()[0] == base)
        for base in dict.fromkeys(name.split()[0] for name in contestants)
    }
    _, config = shape(options)
    result = {
        "recipe": " ".join([options.recipe, *options.overrides]),
        "batch": f"{options.sequences} x {options.length}",
        "dtype": dtype_name(pick_dtype(options.dtype, device)),
        **machine_facts(device, "transformers"),
        "contestants": contestants,
        "ratio": {f"to {base}": round(best["lightlm"] / speed, 3) for base, speed in best.items() if base != "lightlm"},
    }
    if peak := peak_flops(device):
        with torch.device("meta"):
            flops = Transformer(config).flops_per_token(options.length)
        result["mfu"] = {name: round(speed * flops / peak, 3) for name, speed in best.items()}
    return result
