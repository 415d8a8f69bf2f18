"""Time of an optimizer step: AdamW, Muon, and both with cautious decay, for the weights of a recipe.

    python benchmarks/optimizers.py                       # the demo's shape
    python benchmarks/optimizers.py --recipe lightlm --out benchmarks/results/optimizers-lightlm-cpu.json

Every round steps each optimizer once; the fastest round counts, as on a shared machine it is the least disturbed.
--cpu-time counts the process's CPU time instead, for a core that other processes use too (with OMP_NUM_THREADS=1).
The share is that of a training step with the recipe's own batch: the time of its forward and backward passes is
estimated from one micro-batch of --sequences x --length.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lightlm import __version__
from lightlm.device import autocast, describe, pick_device, pick_dtype
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer, parameter_groups
from lightlm.optim.registry import read_section
from lightlm.optim.section import OptimizerSection
from lightlm.recipe import load_recipe
from lightlm.train.step.loss import token_loss

SETTINGS = {
    "adamw": {"name": "adamw"},
    "adamw, cautious": {"name": "adamw", "cautious": True},
    "muon": {"name": "muon"},
    "muon, cautious": {"name": "muon", "cautious": True},
}


class TorchMuon:
    """torch.optim.Muon on the matrices and AdamW on the rest, for comparison."""

    def __init__(self, model: Transformer, section: OptimizerSection) -> None:
        matrices, *rest = parameter_groups(model, section)
        self.parts = [
            torch.optim.Muon(matrices["params"], lr=section.lr, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=section.lr, fused=True),
        ]

    def step(self) -> None:
        for part in self.parts:
            part.step()


def seconds_of(function: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    vocab_size = recipe.model.vocab_size or (8192 if options.recipe == "demo" else 50_257)
    clock = time.process_time if options.cpu_time else time.perf_counter
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    torch.manual_seed(0)
    model = Transformer(replace(recipe.model, vocab_size=vocab_size)).to(device)
    tokens = torch.randint(vocab_size, (options.sequences, options.length + 1), device=device)

    def passes() -> None:
        with autocast(device, dtype):
            loss = token_loss(model, tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()

    passes()
    passes_seconds = min(seconds_of(passes, device, clock) for _ in range(options.rounds))
    batch_seconds = passes_seconds / (options.sequences * options.length) * recipe.train.batch_tokens
    sections = {name: read_section({"lr": 1e-4, **values}) for name, values in SETTINGS.items()}
    steps = {name: build_optimizer(model, section, dtype).step for name, section in sections.items()}
    steps["torch.optim.Muon + AdamW"] = TorchMuon(model, sections["muon"]).step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + options.rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device, clock))
    fastest = {name: min(times[1:]) for name, times in seconds.items()}  # the first makes the state
    result = {
        "recipe": options.recipe,
        "batch_tokens": recipe.train.batch_tokens,
        "passes_of_a_batch_seconds": round(batch_seconds, 3),
        "dtype": str(dtype).removeprefix("torch."),
        "device": describe(device),
        "clock": clock.__name__,
        "machine": platform.platform(),
        "versions": {"lightlm": __version__, "torch": torch.__version__},
        "step_milliseconds": {name: round(1e3 * value, 2) for name, value in fastest.items()},
        "share_of_a_training_step": {
            name: round(value / (value + batch_seconds), 5) for name, value in fastest.items()
        },
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
