"""What `lightlm plan` says beside what a real run takes: memory, and the time of a step and of the run.

    python benchmarks/plan.py                           # the demo, on the data that `make demo` prepared
    python benchmarks/plan.py --steps 30 --out benchmarks/results/plan-demo-cpu.json

Plan and run are processes of their own, one after the other, on the same overrides: the recipe cut to --steps, one
save on the way, one short validation. Differences are (plan - run) / run. A run's seconds are those of its training
steps, the slow first ones included; they leave out validation, of which the plan's hours have a few passes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightlm import __version__
from lightlm.data.folder import resolve_dataset
from lightlm.recipe import load_recipe


def lightlm(*arguments: str, folder: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "lightlm", *arguments, "--json"], cwd=folder, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def compared(planned: float, real: float) -> dict[str, float]:
    return {"plan": planned, "run": real, "difference": round(planned / real - 1, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    batch = recipe.batch_sequences * recipe.seq_len
    overrides = [
        *options.overrides,
        f"data.dataset={resolve_dataset(recipe.data.dataset).resolve()}",
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
    report = {
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
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
