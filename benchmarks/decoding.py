"""Seconds a decoding step: a mixture of experts beside dense models with as many active parameters, and as many in all.

    python benchmarks/decoding.py --recipe moe --dtype bfloat16

With one sequence a step is bound by reading weights: the mixture should be near the dense model of its active size.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from moe import dense_config

from lightlm.device import pick_device
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe


def models(config: ModelConfig) -> dict[str, ModelConfig]:
    config = config.resolved()
    routed = (config.num_experts + config.num_shared_experts) * config.moe_intermediate_size
    first = config.first_k_dense
    total = round((first * config.intermediate_size + (config.num_layers - first) * routed) / config.num_layers)
    active = dense_config(config)
    return {
        "experts": config,
        "dense, active size": active,
        "dense, total size": replace(active, intermediate_size=total),
    }


@torch.no_grad()
def steps(model: Transformer, batch: int) -> Iterator[float]:
    """Endless decoding steps of sequences that differ, after 32 tokens each; the cache starts anew when it is full."""
    while True:
        cache = model.new_cache(batch, 256)
        model(torch.randint(model.config.vocab_size, (batch, 32), device=model.device), cache)
        for _ in range(200):
            tokens = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
            started = time.perf_counter()
            model(tokens, cache).argmax(-1).tolist()
            yield time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="moe")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    device, dtype = pick_device("auto"), getattr(torch, options.dtype)
    recipe = load_recipe(options.recipe)
    config = replace(recipe.model, vocab_size=recipe.model.vocab_size or 50_257)
    print(f"{options.recipe}, {options.dtype}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    built = {name: Transformer(shape).to(device, dtype).eval() for name, shape in models(config).items()}
    for batch in (1, 8):
        running = {name: steps(model, batch) for name, model in built.items()}
        seconds: dict[str, list[float]] = {name: [] for name in built}
        for number in range(options.steps + 5):
            for name, step in running.items():
                taken = next(step)
                if number >= 5:
                    seconds[name].append(taken)
        for name, times in seconds.items():
            low, *_, high = statistics.quantiles(times, n=10)
            counts = built[name].num_parameters()
            print(
                f"batch {batch}  {name:18} {counts['total'] / 1e6:6.1f}M, {counts['active'] / 1e6:5.1f}M active  "
                f"{statistics.median(times) * 1e3:6.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f})"
            )


if __name__ == "__main__":
    main()
