"""Validation loss of mixtures of experts and of a dense model with the same active parameters.

    python benchmarks/moe_quality.py DATA --seeds 1 2 3 --variants dense moe --out moe-quality.json

Prints each variant's mean validation loss, its standard deviation over seeds, and its difference to the dense model.
All variants see the same tokens in the same order. DATA is a folder of `lightlm prepare-data CORPUS --tokenizer
train:8192`. Runs that OUT already holds are not repeated.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import make_parser, write_json

RECIPE = """
name: moe-quality
model:
  num_layers: 6
  hidden_size: 128
  num_heads: 4
  num_kv_heads: 2
  intermediate_size: 384
  max_seq_len: 256
  qk_norm: true
  init_std: 0.0884
data: {{dataset: "{data}"}}
train: {{tokens: {tokens}, batch_tokens: 8K, compile: false}}
optimizer: {{name: adamw, lr: 4e-3, weight_decay: 0.1}}
schedule: {{name: wsd, warmup: 5%, decay: 30%}}
eval: {{tokens: 400K, prompts: []}}
"""


def _moe(experts: int, chosen: int, shared: int, size: int, *more: str) -> list[str]:
    keys = {"num_experts": experts, "num_experts_per_tok": chosen, "num_shared_experts": shared}
    settings = [f"model.{key}={value}" for key, value in (keys | {"moe_intermediate_size": size}).items()]
    return [*settings, *more]


FIRST_DENSE, RATE = "model.first_k_dense=1", "moe.bias_update_rate=0.01"
# All have 384 active intermediate features in each layer.
VARIANTS: dict[str, list[str]] = {
    "dense": [],
    "moe": _moe(16, 4, 2, 64, FIRST_DENSE, RATE),
    "coarse": _moe(8, 2, 1, 128, FIRST_DENSE, RATE),
    "fine": _moe(32, 8, 4, 32, FIRST_DENSE, RATE),
    "no shared": _moe(16, 6, 0, 64, FIRST_DENSE, RATE),
    "no dense layer": _moe(16, 4, 2, 64, RATE),
    "softmax": _moe(16, 4, 2, 64, FIRST_DENSE, "model.router=softmax"),
    "slow bias": _moe(16, 4, 2, 64, FIRST_DENSE, "moe.bias_update_rate=0.001"),
    "no balancing": _moe(16, 4, 2, 64, FIRST_DENSE, "moe.bias_update_rate=0", "moe.balance_loss_coef=0"),
    "scaled": _moe(16, 4, 2, 64, FIRST_DENSE, RATE, "model.routed_scaling_factor=2.0"),
    "more experts": _moe(32, 4, 2, 64, FIRST_DENSE, RATE),
}


def train(recipe: Path, runs: Path, variant: str, seed: int) -> dict[str, Any]:
    """Train one run and return its metrics."""
    command = [sys.executable, "-m", "lightlm", "train", recipe.name, f"train.seed={seed}", *VARIANTS[variant]]
    name = f"{variant.replace(' ', '-')}-{seed}"
    subprocess.run([*command, "--name", name], cwd=recipe.parent, check=True, stdout=subprocess.DEVNULL)
    lines = (runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    found = {"variant": variant, "seed": seed, "tokens": last["tokens"]}
    return found | {key: last[key] for key in ("val_loss", "val_bpb", "seconds")}


def table(results: list[dict[str, Any]]) -> None:
    """Print a line per variant."""
    base = {run["seed"]: run["val_loss"] for run in results if run["variant"] == "dense"}
    for variant in dict.fromkeys(run["variant"] for run in results):
        runs = [run for run in results if run["variant"] == variant]
        losses = [run["val_loss"] for run in runs]
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        gains = [run["val_loss"] - base[run["seed"]] for run in runs if run["seed"] in base]
        beside = f"{statistics.mean(gains):+.4f} to dense" if gains else ""
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"{variant:16} {statistics.mean(losses):.4f}{spread} ({len(losses)} seeds)  {beside}  {seconds:.0f} s")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["dense", "moe"])
    parser.add_argument("--tokens", default="3M")
    parser.add_argument("--folder", type=Path, default=Path("moe-quality"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("moe-quality.json"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    recipe = options.folder.resolve() / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=options.data.resolve(), tokens=options.tokens), encoding="utf-8")
    results = json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.out.exists() else []
    done = {(run["variant"], run["seed"]) for run in results}
    import torch

    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    for seed in options.seeds:
        for variant in options.variants:
            if (variant, seed) not in done:
                results.append(train(recipe, recipe.parent / "runs", variant, seed))
                write_json(facts | {"runs": results}, options.out)
                table(results)
    table(results)


if __name__ == "__main__":
    main()
