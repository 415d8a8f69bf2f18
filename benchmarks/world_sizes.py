"""How far losses differ between 1, 2 and 4 processes on the same global batch, and between two runs of the same number.

python benchmarks/world_sizes.py --out benchmarks/results/world-sizes.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.corpus import TINY_RECIPE, make_data

STRATEGIES = ("ddp", "fsdp")


def losses(folder: Path, processes: int, strategy: str, name: str) -> list[float]:
    command = [sys.executable, "-m", "lightlm", "train", "tiny.yaml", "--name", name, "--nproc", str(processes)]
    source = str(Path(__file__).parents[1])
    subprocess.run(
        [*command, f"train.parallel={strategy}"],
        cwd=folder,
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": source},
    )
    return [json.loads(line)["loss"] for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {"machine": platform.platform(), "torch": torch.__version__, "dtype": "float32", "largest_difference": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder)
        (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
        alone = losses(folder, 1, "ddp", "one")
        result["steps"] = len(alone)
        for strategy in STRATEGIES:
            for processes in (2, 4):
                first, again = (losses(folder, processes, strategy, f"{strategy}-{processes}-{i}") for i in range(2))
                result["largest_difference"][f"{processes} processes, {strategy}"] = {
                    "to one process": max(abs(a - b) for a, b in zip(alone, first, strict=True)),
                    "to a second run": max(abs(a - b) for a, b in zip(first, again, strict=True)),
                }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
