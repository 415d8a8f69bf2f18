"""Training speed of LightLM beside transformers: the same model, batch and precision, in turn, in one process.

    python benchmarks/train.py                        # the demo's shape
    python benchmarks/train.py --recipe lightlm --sequences 2 --length 1024
    python benchmarks/train.py --recipe gpt2-124m --sequences 4 --length 1024 --out benchmarks/results/gpt2-cpu.json

Each round runs one step of each (forward, backward, clipping, AdamW), so that a busy moment of the machine meets both.
The printed speed is the median over rounds; the spread is the range from the slowest to the fastest round.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from lightlm import __version__
from lightlm.convert.layouts import write_config
from lightlm.convert.registry import export_target
from lightlm.device import autocast, describe, pick_device, pick_dtype
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe
from lightlm.train.loss import token_loss
from lightlm.train.optimizers import build_optimizer

WARM_UP = 3  # rounds that are not counted


def lightlm_step(config: ModelConfig, recipe, tokens: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    model = Transformer(config).to(tokens.device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def loss() -> Tensor:
        return token_loss(model, inputs, targets) / targets.numel()

    return stepper(model, recipe, loss, tokens.device, dtype)


def transformers_step(config: ModelConfig, recipe, tokens: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    values = write_config(export_target(config).model_type, config.resolved())
    # Without dropout, as LightLM trains; scaled_dot_product_attention is transformers' default.
    their_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(their_config).to(tokens.device)
    model.config.use_cache = False
    # transformers shifts labels itself; one more token gives the same number of predictions.
    return stepper(model, recipe, lambda: model(tokens, labels=tokens).loss, tokens.device, dtype)


def stepper(
    model: torch.nn.Module, recipe, loss: Callable[[], Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """One training step of `model`; both sides share all of it but the loss."""
    optimizer = build_optimizer(model.train(), recipe.optimizer)

    def step() -> None:
        with autocast(device, dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    vocab_size = recipe.model.vocab_size or (8192 if options.recipe == "demo" else 50_257)
    config = replace(recipe.model, vocab_size=vocab_size, max_seq_len=max(options.length + 1, recipe.model.max_seq_len))
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    torch.manual_seed(0)
    tokens = torch.randint(vocab_size, (options.sequences, options.length + 1), device=device)
    steps = {
        "lightlm": lightlm_step(config, recipe, tokens, dtype),
        "transformers": transformers_step(config, recipe, tokens, dtype),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(WARM_UP + options.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if round_number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    count = options.sequences * options.length
    speeds = {name: [count / second for second in times] for name, times in seconds.items()}
    result = {
        "recipe": " ".join([options.recipe, *options.overrides]),
        "batch": f"{options.sequences} x {options.length}",
        "dtype": str(dtype).removeprefix("torch."),
        "device": describe(device),
        "machine": platform.platform(),
        "versions": {"lightlm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "tokens_per_second": {
            name: {
                "median": round(statistics.median(values)),
                "slowest": round(min(values)),
                "fastest": round(max(values)),
            }
            for name, values in speeds.items()
        },
        "ratio": round(statistics.median(speeds["lightlm"]) / statistics.median(speeds["transformers"]), 3),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
