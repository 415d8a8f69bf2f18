"""Compare the losses of two commits: `make compare BASE=COMMIT`.

A refactor must leave every loss and gradient norm identical to the last bit. This script trains each recipe for some
steps with the code of `BASE` (in a temporary git worktree) and with the working tree, on the same data, and prints the
first step that differs. Exit code 0: identical; 1: a step differs.

    python benchmarks/compare_commits.py BASE [--steps 20] [--recipes demo,moe-demo]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import make_parser

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ("loss", "grad_norm")


def main() -> int:
    """Run the comparison; returns the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recipes", default="demo,moe-demo", help="shipped recipes, separated by commas")
    arguments = parser.parse_args()
    different = False
    with tempfile.TemporaryDirectory(prefix="lightlm-compare-") as folder:
        base, work = Path(folder) / "base", Path(folder) / "work"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", base, arguments.base], cwd=ROOT, check=True)
        try:
            work.mkdir()
            lightlm(ROOT, work, "prepare-data", "pydocs", "--tokenizer", "train:8192")
            for recipe in arguments.recipes.split(","):
                before = metrics(base, work, recipe, arguments.steps)
                after = metrics(ROOT, work, recipe, arguments.steps)
                different |= report(recipe, before, after, arguments.steps)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", base], cwd=ROOT, check=True)
    return int(different)


def metrics(code: Path, work: Path, recipe: str, steps: int) -> list[dict[str, Any]]:
    """The metrics of `steps` steps of a recipe, trained with the package in `code`."""
    text = (code / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    batch = next(line for line in text.splitlines() if line.strip().startswith("batch_tokens:"))
    batch_tokens = int(batch.split(":")[1].split("#")[0].strip().removesuffix("K")) * 1024
    name = f"{recipe}-{code.name}"
    overrides = [f"train.tokens={steps * batch_tokens}", "eval.prompts=[]", "eval.tokens=4K"]
    lightlm(code, work, "train", recipe, *overrides, "--name", name)
    lines = (work / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def lightlm(code: Path, work: Path, *command: str) -> None:
    """Run the `lightlm` command of the package in `code`, in the folder `work`."""
    # One thread: results do not depend on the machine's load, and a busy machine compares as fast as an idle one.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(code)}
    done = subprocess.run(
        [sys.executable, "-m", "lightlm", *command], cwd=work, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"`lightlm {' '.join(command)}` failed with the code in {code}:\n{done.stderr}")


def report(recipe: str, before: list[dict[str, Any]], after: list[dict[str, Any]], steps: int) -> bool:
    """Print whether two runs are identical; returns whether they differ."""
    if len(before) != steps or len(after) != steps:
        print(f"{recipe}: expected {steps} steps, got {len(before)} and {len(after)}")
        return True
    for old, new in zip(before, after, strict=True):
        for key in COMPARED:
            if old[key] != new[key]:
                print(f"{recipe}: step {old['step']} differs first: {key} {old[key]!r} before, {new[key]!r} now")
                return True
    print(f"{recipe}: {steps} steps identical ({', '.join(COMPARED)}); last loss {after[-1]['loss']!r}")
    return False


if __name__ == "__main__":
    sys.exit(main())
