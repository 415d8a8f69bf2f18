"""The estimates of `lightlm plan` beside a real run: memory, and the time of a step and of the run.

    python benchmarks/plan.py                           # the demo, on the data that `make demo` prepared
    python benchmarks/plan.py --steps 30 --out benchmarks/results/plan-demo-cpu.json

Prints JSON with plan, run and difference, which is (plan - run) / run. Plan and run are separate processes with the
same overrides: the recipe cut to --steps, with one save and one short validation. A run's seconds are those of its
training steps, the slow first ones included; they leave out validation, which the plan's hours include.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import make_parser, report

from lightlm import __version__
from lightlm.data.folder import resolve_dataset
from lightlm.recipe import load_recipe


def lightlm(*arguments: str, folder: str) -> dict[str, Any]:
    """Run a command in a folder and return its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "lightlm", *arguments, "--json"], cwd=folder, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def compared(planned: float, real: float) -> dict[str, float]:
    return {"plan": planned, "run": real, "difference": round(planned / real - 1, 4)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    batch = recipe.batch_sequences * recipe.seq_len
    overrides = [
        *options.overrides,
        f"data.dataset={resolve_dataset(recipe.data.main).resolve()}",
        f"train.tokens={options.steps * batch}",
        f"checkpoint.every={options.steps // 2 * batch}",
        "eval.every=0",
        "eval.tokens=4096",
        "eval.prompts=[]",
    ]
    with tempfile.TemporaryDirectory() as folder:
        plan = lightlm("plan", options.recipe, *overrides, folder=folder)
        result = lightlm("train", options.recipe, *overrides, "--name", "real", folder=folder)
        lines = (Path(folder) / "runs" / "real" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    machine, memory = plan["machine"], max(step["memory"] for step in steps)
    comparison = {
        "recipe": " ".join([options.recipe, *options.overrides]),
        "device": machine["device"],
        "dtype": machine["dtype"],
        "lightlm": __version__,
        "steps": compared(plan["run"]["steps"], result["step"]),
        "memory, sum of parts": compared(machine["memory"]["total"], memory),
        "memory, probed": compared(machine["measured"]["memory"], memory),
        "step seconds, median": compared(
            machine["measured"]["step_seconds"], statistics.median(step["step_seconds"] for step in steps)
        ),
        "run seconds": compared(machine["measured"]["hours"] * 3600, sum(step["step_seconds"] for step in steps)),
        "parts": machine["memory"],
    }
    report(comparison, options.out)


if __name__ == "__main__":
    main()
