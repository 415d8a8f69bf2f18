"""Time of an optimizer step: AdamW, Muon and NorMuon, and their variants, for the weights of a recipe.

    python benchmarks/optimizers.py                       # the demo's shape
    python benchmarks/optimizers.py --recipe lightlm --out benchmarks/results/optimizers-lightlm-cpu.json

Prints JSON: milliseconds per step of each optimizer, and its share of a training step with the recipe's own batch.
Every round steps each optimizer once. The fastest round counts: on a shared machine it is the least disturbed.
--cpu-time counts the process's CPU time instead, for a core that other processes use too (with OMP_NUM_THREADS=1). The
time of forward and backward passes is estimated from one micro-batch of --sequences x --length.
"""

import time
from pathlib import Path

import torch
from common import make_parser, report
from measure import dtype_name, load_shape, machine_facts, seconds_of

from lightlm.device import autocast, pick_device, pick_dtype
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer, parameter_groups
from lightlm.optim.registry import read_section
from lightlm.optim.section import OptimizerSection
from lightlm.train.step.loss import token_loss

SETTINGS = {
    "adamw": {"name": "adamw"},
    "adamw, cautious": {"name": "adamw", "cautious": True},
    "adamw, half-life": {"name": "adamw", "beta2_half_life": "10M"},
    "muon": {"name": "muon"},
    "muon, cautious": {"name": "muon", "cautious": True},
    "muon, polar_express": {"name": "muon", "orthogonalization": "polar_express"},
    "normuon": {"name": "normuon"},
    "normuon, polar_express": {"name": "normuon", "orthogonalization": "polar_express"},
}


class TorchMuon:
    """torch.optim.Muon for the matrices and AdamW for the rest, for comparison."""

    def __init__(self, model: Transformer, section: OptimizerSection) -> None:
        matrices, *rest = parameter_groups(model, section)
        self.parts = [
            torch.optim.Muon(matrices["params"], lr=section.lr, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=section.lr, fused=True),
        ]

    def step(self) -> None:
        for part in self.parts:
            part.step()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe, config = load_shape(options.recipe)
    clock = time.process_time if options.cpu_time else time.perf_counter
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    tokens = torch.randint(config.vocab_size, (options.sequences, options.length + 1), device=device)

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
    fastest = {name: min(times[1:]) for name, times in seconds.items()}  # the first round makes the state
    result = {
        "recipe": options.recipe,
        "batch_tokens": recipe.train.batch_tokens,
        "passes_of_a_batch_seconds": round(batch_seconds, 3),
        "dtype": dtype_name(dtype),
        "clock": clock.__name__,
        **machine_facts(device),
        "step_milliseconds": {name: round(1e3 * value, 2) for name, value in fastest.items()},
        "share_of_a_training_step": {
            name: round(value / (value + batch_seconds), 5) for name, value in fastest.items()
        },
    }
    report(result, options.out)


if __name__ == "__main__":
    main()
