"""How far losses differ between 1, 2 and 4 processes on the same global batch, and between two runs of the same number.

    python benchmarks/world_sizes.py --out benchmarks/results/world-sizes.json

Prints JSON with the largest differences, for DDP and FSDP.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import make_parser, report
from measure import machine_facts

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.corpus import TINY_RECIPE, make_data

STRATEGIES = ("ddp", "fsdp")


def losses(folder: Path, processes: int, strategy: str, name: str) -> list[float]:
    """Train a run and return its losses."""
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
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = machine_facts() | {"dtype": "float32", "largest_difference": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder)
        (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
        single = losses(folder, 1, "ddp", "one")
        result["steps"] = len(single)
        for strategy in STRATEGIES:
            for processes in (2, 4):
                first, again = (losses(folder, processes, strategy, f"{strategy}-{processes}-{i}") for i in range(2))
                result["largest_difference"][f"{processes} processes, {strategy}"] = {
                    "to one process": max(abs(a - b) for a, b in zip(single, first, strict=True)),
                    "to a second run": max(abs(a - b) for a, b in zip(first, again, strict=True)),
                }
    report(result, options.out)


if __name__ == "__main__":
    main()
