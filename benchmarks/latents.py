"""Milliseconds of decoding steps with latent attention, absorbed and plain, and with grouped queries at one size.

    python benchmarks/latents.py [--rounds 3]
    python benchmarks/latents.py --ladder     # of the study `latents` of learning.py, with its losses

Prints parameters, cache bytes per token in bf16, and medians per number of positions before, rows and new tokens. With
--ladder, prints a Markdown table of one line per contestant; each decodes in the way that `lightlm generate` takes.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import evidence
import learning
import torch
from common import make_parser

from lightlm.generate.step import fast
from lightlm.generate.step.fast import FastForward
from lightlm.model import attention
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe

_BASE = ModelConfig(
    num_layers=12, hidden_size=512, num_heads=8, max_seq_len=2048, vocab_size=8192, intermediate_size=1408
)
_SHAPES = {
    "gqa": {"num_kv_heads": 2},
    "mla": {
        "attention": "mla",
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
}
# Positions before, rows, and new tokens of each row.
_CALLS = ((100, 1, 1), (1000, 1, 1), (1900, 1, 1), (1000, 8, 1), (1000, 1, 8), (1000, 1, 64), (0, 1, 512))


@torch.inference_mode()
def seconds(model: Transformer, forward: FastForward, before: int, rows: int, new: int) -> float:
    """Return the median seconds of a call."""
    cache, tokens_BT, found = model.new_cache(rows), torch.zeros(rows, new, dtype=torch.long), []
    for _ in range(4):
        cache.lengths = [before] * rows
        started = time.perf_counter()
        forward(tokens_BT, cache)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def ladder(rounds: int) -> None:
    """Print a line for each contestant of the study `latents`: its loss is the mean of its seeds, `-` before it ran."""
    study, models = learning.read_studies()["latents"], {}
    records = evidence.read(learning.RESULTS, ["latents"], missing_ok=True)
    final = evidence.finals(records[0], "val_loss") if records else {}
    for name, entry in study.contestants.items():
        config = replace(load_recipe(entry.path, [*study.settings, *entry.changes]).model, vocab_size=8192)
        models[name] = Transformer(config).eval().bfloat16()
    forwards = {name: FastForward(model) for name, model in models.items()}
    calls = {"decode": (128, 1, 1), "prefill": (0, 1, 256)}  # positions before, rows, new tokens
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, model in models.items():
            for kind, call in calls.items():
                found.setdefault((name, kind), []).append(call[2] / seconds(model, forwards[name], *call))
    print("| contestant | weights besides tables | cache bytes per token | loss | decode tokens/s | prefill tokens/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, model in models.items():
        losses = list(final.get(name, {}).values())
        counts, cached = model.num_parameters(), 2 * model.config.depth * math.prod(model.config.cached_shape)
        speeds = [f"{statistics.median(found[name, kind]):,.0f}" for kind in calls]
        loss = f"{statistics.mean(losses):.4f} ({len(losses)} seed{'s'[: len(losses) > 1]})" if losses else "-"
        weights = f"{counts['total'] - counts['embedding']:,}"
        print(f"| {' | '.join([name, weights, f'{cached:,}', loss, *speeds])} |", flush=True)


def main() -> None:
    """Measure all ways in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ladder", action="store_true", help="the shapes and losses of the study `latents`")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.ladder:
        ladder(options.rounds)
        return
    rounds = options.rounds
    models = {}
    for name, changes in _SHAPES.items():
        config = ModelConfig(**_BASE.to_dict() | changes)
        models[name] = model = Transformer(config).eval().bfloat16()
        per_token = 2 * model.config.depth * math.prod(model.config.cached_shape)
        print(f"{name}: {model.num_parameters()['total']:,} parameters, {per_token:,} bytes of cache per token")
    rule, compiled = attention.absorbs, FastForward(models["gqa"])
    fast.is_available = lambda model: False
    latent = FastForward(models["mla"])
    ways: dict[str, tuple[str, FastForward, Callable[..., bool]]] = {
        "gqa in C": ("gqa", compiled, rule),
        "gqa in torch": ("gqa", FastForward(models["gqa"]), rule),
        "mla absorbed": ("mla", latent, lambda *_: True),
        "mla plain": ("mla", latent, lambda *_: False),
        "mla, the rule's choice": ("mla", latent, rule),
    }
    for before, rows, new in _CALLS:
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (model_name, forward, absorbs) in ways.items():
                attention.absorbs = absorbs
                found[name].append(seconds(models[model_name], forward, before, rows, new))
        medians = ", ".join(f"{name} {1e3 * statistics.median(times):.1f} ms" for name, times in found.items())
        print(f"{before} before, {rows} rows, {new} new: {medians}", flush=True)


if __name__ == "__main__":
    main()
