"""Milliseconds per decoding step of a mixture of experts and of dense models of its active and its total size.

    python benchmarks/decoding.py --recipe moe --dtype bfloat16

Prints the median and the 10th and 90th percentile for 1 and 8 sequences. With one sequence a step is bound by reading
weights, so the mixture should be close to the dense model of its active size.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
from common import make_parser
from measure import dense_config, load_shape, seconds_of

from lightlm.device import pick_device
from lightlm.generate.step.fast import forward_of
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer


def models(config: ModelConfig) -> dict[str, ModelConfig]:
    """Return the three shapes by name."""
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
    """Yield the seconds of decoding steps without end, after a prompt of 32 tokens; a full cache is replaced."""
    forward = forward_of(model)
    while True:
        cache = model.new_cache(batch, 256)
        forward(torch.randint(model.config.vocab_size, (batch, 32), device=model.device), cache)
        for _ in range(200):
            tokens = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
            yield seconds_of(lambda x=tokens, cache=cache: forward(x, cache).argmax(-1).tolist(), model.device)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="moe")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    device, dtype = pick_device("auto"), getattr(torch, options.dtype)
    _, config = load_shape(options.recipe)
    print(f"{options.recipe}, {options.dtype}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    built = {name: Transformer(shape).to(device, dtype).eval() for name, shape in models(config).items()}
    for model in built.values():
        model.round_decoding_to(options.quantize)
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
