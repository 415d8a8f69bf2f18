"""Training speed of LightLM beside transformers and nanoGPT: the same model, batch and precision, in turn, in one run.

    python benchmarks/train.py                                                   # the demo's shape
    python benchmarks/train.py --recipe lightlm --sequences 2 --length 1024 model.qk_norm=false
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/train.py --recipe gpt2-124m --sequences 4 --length 1024 --nanogpt nanoGPT \\
        --contestants "lightlm,transformers,nanogpt compiled"

Each contestant has a process of its own, so that its allocator settings and its peak memory are its own, and each round
runs one step of each (forward, backward, clipping, AdamW), so that a busy moment of the machine meets all. Speeds
are medians over rounds; the spread is the range from the slowest to the fastest round. nanoGPT trains as its train.py
does: its own optimizer settings and its vocabulary of 50,304. Where a contestant runs both plain and compiled, ratios
are between the faster of each. All hold their memory at once: 5 to 8 GB each for these shapes.
"""

import argparse
import itertools
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightlm import __version__
from lightlm.convert.huggingface.config import write_config
from lightlm.convert.huggingface.export_target import export_target
from lightlm.data.loader import BatchLoader
from lightlm.data.shards import DataFolder
from lightlm.device import autocast, describe, keep_freed_memory, peak_flops, pick_device, pick_dtype
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.recipe import Recipe, load_recipe
from lightlm.train.observe.metrics import peak_memory
from lightlm.train.step.parallel import LossModule
from lightlm.train.step.routers import router_losses

WARM_UP = 4  # rounds that are not counted: the first steps fault in their memory and compile


# The model, its mean loss of tokens (B, T + 1), and its optimizer.
Contestant = tuple[Any, Callable[[Tensor], Tensor], torch.optim.Optimizer]


def lightlm(options: argparse.Namespace, device: torch.device, compiled: bool) -> Contestant:
    recipe, config = shape(options)
    if device.type == "cpu":
        keep_freed_memory()
    model = Transformer(config).to(device)
    loss = LossModule(model, router_losses(recipe))
    if compiled:
        model.compile_blocks() if device.type == "cpu" else loss.compile()

    def mean_loss(tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:].contiguous()
        return loss(tokens[:, :-1], targets).objective / targets.numel()

    return model, mean_loss, build_optimizer(model, recipe.optimizer, pick_dtype(options.dtype, device))


def transformers(options: argparse.Namespace, device: torch.device, compiled: bool) -> Contestant:
    import transformers

    recipe, config = shape(options)
    values = write_config(export_target(config).model_type, config.resolved())
    # Without dropout, as LightLM trains; scaled_dot_product_attention is transformers' default.
    their_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(their_config).to(device).train()
    model.config.use_cache = False
    optimizer = build_optimizer(model, recipe.optimizer, pick_dtype(options.dtype, device))
    if compiled:
        model.compile()
    # transformers shifts labels itself; one more token gives the same number of predictions.
    return model, lambda tokens: model(tokens, labels=tokens).loss, optimizer


def nanogpt(options: argparse.Namespace, device: torch.device, compiled: bool) -> Contestant:
    sys.path.insert(0, str(options.nanogpt))
    from model import GPT, GPTConfig

    recipe, config = shape(options)
    if (config.norm, config.mlp, config.position) != ("layernorm", "gelu", "learned"):
        raise SystemExit("nanoGPT has only GPT-2's architecture: use --recipe gpt2-124m")
    model = GPT(
        GPTConfig(
            block_size=options.length,
            vocab_size=50_304,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.hidden_size,
            dropout=0.0,
            bias=config.bias,
        )
    ).to(device)
    section = recipe.optimizer
    optimizer = model.configure_optimizers(section.weight_decay, section.lr, section.betas, device.type)
    run = torch.compile(model) if compiled else model
    return model, lambda tokens: run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1], optimizer


CONTESTANTS = {"lightlm": lightlm, "transformers": transformers, "nanogpt": nanogpt}


def shape(options: argparse.Namespace) -> tuple[Recipe, ModelConfig]:
    recipe = load_recipe(options.recipe, options.overrides)
    vocab_size = recipe.model.vocab_size or (8192 if "demo" in options.recipe else 50_257)
    length = max(options.length + 1, recipe.model.max_seq_len)
    config = replace(recipe.model, vocab_size=vocab_size, max_seq_len=length)
    if getattr(options, "dense", False):
        from moe import dense_config

        config = dense_config(config)
        recipe = recipe.model_copy(update={"model": config})
    return recipe, config


def batches_of(options: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    """Endless batches (B, T + 1): of prepared data where given, else of random tokens."""
    shape_BT = options.sequences, options.length + 1
    if options.data is None:
        _, config = shape(options)
        while True:
            yield torch.randint(config.vocab_size, shape_BT, device=device)
    loader = BatchLoader(DataFolder.open(options.data).split("train"), options.length, 0)
    for start in itertools.count(0, options.sequences):
        inputs, targets = loader.batch(start, options.sequences)
        yield torch.cat([inputs, targets[:, -1:]], dim=1).to(device)


def contend(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    """One contestant's process: a step for each message, answered with its seconds; at the end the peak memory."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    torch.manual_seed(0)
    base, _, suffix = name.partition(" ")
    model, loss, optimizer = CONTESTANTS[base](options, device, suffix == "compiled")
    batches = batches_of(options, device)
    while pipe.recv():
        tokens = next(batches)
        started = time.perf_counter()
        with autocast(device, dtype):
            value = loss(tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()
        pipe.send(time.perf_counter() - started)
    pipe.send(peak_memory(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, recipe="demo", contestants="lightlm,transformers")
    options = parser.parse_args()
    seconds, peaks = compete(options.contestants.split(","), options, contend)
    report(summary(options, seconds, peaks), options.out)


def add_options(parser: argparse.ArgumentParser, recipe: str, contestants: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--data", type=Path, help="a prepared folder; random tokens otherwise")
    parser.add_argument("--contestants", default=contestants, help="names; 'NAME compiled' for torch.compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)


def report(result: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(result, indent=2))
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def compete(
    names: list[str], options: argparse.Namespace, target: Callable[..., None]
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """The seconds of each contestant's steps, and its peak memory."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pipes: dict[str, Connection] = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=target, args=(name, options, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in names}
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
    from importlib.metadata import version

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
        "dtype": str(pick_dtype(options.dtype, device)).removeprefix("torch."),
        "device": describe(device),
        "machine": f"{platform.platform()}, {processor()}",
        "versions": {"lightlm": __version__, "torch": torch.__version__, "transformers": version("transformers")},
        "contestants": contestants,
        "ratio": {f"to {base}": round(best["lightlm"] / speed, 3) for base, speed in best.items() if base != "lightlm"},
    }
    if peak := peak_flops(device):
        with torch.device("meta"):
            flops = Transformer(config).flops_per_token(options.length)
        result["mfu"] = {name: round(speed * flops / peak, 3) for name, speed in best.items()}
    return result


def processor() -> str:
    """The CPU's name and the features that decide its speed here."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    text = path.read_text(encoding="utf-8")
    name = next(line.split(": ")[1] for line in text.splitlines() if line.startswith("model name"))
    return name + (" with AMX" if "amx_bf16" in text else "")


if __name__ == "__main__":
    main()
