"""Time of routed experts, forward and backward, for each way to compute them, and of a dense network of their size.

    python benchmarks/experts.py --tokens 4096 --hidden 512 --experts 16 --chosen 4 --size 128

Prints the median and the 10th and 90th percentile in milliseconds. Every repetition has another routing, as in
training: oneDNN keeps kernels by shape.
"""

import functools
import statistics
from collections.abc import Callable

import torch
from common import make_parser
from measure import seconds_of
from torch import Tensor

from lightlm.device import autocast, keep_freed_memory, pick_device
from lightlm.model.config import ModelConfig
from lightlm.model.experts import Experts
from lightlm.model.fused import kept_weight_copies
from lightlm.model.mlp import SwiGLU


def routings(tokens: int, experts: int, chosen: int, spread: float, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return choices and weights of experts, whose loads relative to their mean differ by about `spread`."""
    found = []
    for _ in range(count):
        scores = torch.rand(tokens, experts) + 0.2 * spread * torch.randn(experts)
        found.append((scores.topk(chosen).indices, torch.rand(tokens, chosen)))
    return found


def loop(experts: Experts, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Compute experts like most implementations: a Python loop with a gather, three products and a scatter each."""
    y_ND = torch.zeros_like(x_ND)
    for expert in range(len(experts.gate_proj)):
        token, choice = torch.where(ids_NK == expert)
        x = x_ND[token]
        h = torch.nn.functional.silu(x @ experts.gate_proj[expert].T) * (x @ experts.up_proj[expert].T)
        y = (h @ experts.down_proj[expert].T) * weights_NK[token, choice, None]
        y_ND = y_ND.index_add(0, token, y.to(x_ND.dtype))
    return y_ND


def main() -> None:
    parser = make_parser(__doc__)
    for name, default in (("tokens", 4096), ("hidden", 512), ("experts", 16), ("chosen", 4), ("size", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--spread", type=float, default=0.15)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    device, dtype = pick_device("auto"), getattr(torch, options.dtype)
    config = ModelConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_heads=1,
        max_seq_len=1,
        num_experts=options.experts,
        num_experts_per_tok=options.chosen,
        moe_intermediate_size=options.size,
        norm_topk_prob=options.chosen > 1,
    ).resolved()
    experts, dense = Experts(config).to(device), SwiGLU(config, options.chosen * options.size).to(device)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype, requires_grad=True)
    routes = routings(options.tokens, options.experts, options.chosen, options.spread, options.repetitions + 3)
    loads = [torch.bincount(ids.flatten(), minlength=options.experts).double() for ids, _ in routes]
    violation = statistics.mean((load.max() / load.mean() - 1).item() for load in loads)
    print(
        f"{options}\n{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, violation {violation:.2f}"
    )

    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "dense": lambda x, ids, weights: dense(x),
        "padded": experts._padded,
        "grouped": experts._grouped,
        "loop": functools.partial(loop, experts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    grad = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype)

    def passes(way: Callable[[Tensor, Tensor, Tensor], Tensor], ids: Tensor, weights: Tensor) -> None:
        with kept_weight_copies(), autocast(device, dtype):
            way(x, ids, weights).backward(grad)

    for number, (ids, weights) in enumerate(routes):
        ids, weights = ids.to(device), weights.to(device).requires_grad_()
        for name, way in ways.items():
            for parameter in (x, *experts.parameters(), *dense.parameters()):
                parameter.grad = None
            taken = seconds_of(lambda way=way, ids=ids, weights=weights: passes(way, ids, weights), device)
            if number >= 3:
                seconds[name].append(taken)
    base = statistics.median(seconds["dense"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        low, *_, high = statistics.quantiles(times, n=10)
        print(f"{name:8} {middle * 1e3:8.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f}), {middle / base:5.2f} x dense")


if __name__ == "__main__":
    main()
