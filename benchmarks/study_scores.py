"""Scores of the models of a study of learning.py that keeps its checkpoints, by contestant and seed.

    python benchmarks/study_scores.py teacher --work WORK [--tasks heldout]
    python benchmarks/study_scores.py heldout --work WORK --data data/heldout-8k

Runs `lightlm eval` on each finished run; the same command resumes. Prints a Markdown table: means with the standard
deviation over seeds, and the mean difference to the first contestant with its standard deviation, paired by seed.
Writes benchmarks/results/learning/STUDY-scores.json.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import learning
from common import make_parser, write_json

from lightlm.evaluate.results.store import file_stem
from lightlm.evaluate.settings import Settings

Scores = dict[str, float]  # by "TASK METRIC"


def scores_of(run: Path, tasks: str, data: Path | None = None) -> Scores:
    """Score a run, on a data folder of its own or on another, unless its folder has these scores already."""
    stem = file_stem(Settings(tasks.split(","), data=None if data is None else str(data)))
    found = sorted((run / "eval").glob(f"*_{stem}.json"))
    if not found:
        other = [] if data is None else ["--data", str(data)]
        subprocess.run([sys.executable, "-m", "lightlm", "eval", str(run), "--tasks", tasks, *other], check=True)
        found = sorted((run / "eval").glob(f"*_{stem}.json"))
    results = json.loads(found[-1].read_text(encoding="utf-8"))["results"]
    return {
        f"{task} {key.split(',')[0]}": value
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, float) and "stderr" not in key
    }


def spread(values: list[float], sign: str = "") -> str:
    """Return a mean with the standard deviation of its seeds."""
    deviation = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{deviation}"


def table(scores: dict[str, dict[int, Scores]], metrics: list[str]) -> str:
    """Return the scores as Markdown."""
    first = next(iter(scores.values()))
    lines = ["| contestant | seeds | " + " | ".join(metrics) + " |", "| --- | --- |" + " --- |" * len(metrics)]
    for name, runs in scores.items():
        cells = [name, str(len(runs))]
        for metric in metrics:
            cell = spread([values[metric] for values in runs.values()])
            paired = [values[metric] - first[seed][metric] for seed, values in runs.items() if seed in first]
            cells.append(cell if runs is first or not paired else f"{cell}, {spread(paired, '+')}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from lightlm.sweep.folder import SweepFolder

    parser = make_parser(__doc__)
    parser.add_argument("study")
    parser.add_argument("--work", type=Path, required=True, help="folder of data and runs")
    parser.add_argument("--tasks", default="heldout", help="as in `lightlm eval --tasks`")
    parser.add_argument("--data", type=Path, help="data folder of heldout, from WORK; default is the runs' own")
    options = parser.parse_args()
    os.chdir(options.work)
    sweep = SweepFolder(Path("sweeps") / options.study)
    if (definition := sweep.read()) is None:
        parser.error(f"{options.work} has no runs of {options.study}")
    scores: dict[str, dict[int, Scores]] = {}
    for name, entry in definition.entries.items():
        for cell in entry.cells():
            if sweep.status(cell).state == "done":
                scores.setdefault(name, {})[cell.seed] = scores_of(sweep.run(cell), options.tasks, options.data)
    metrics = list(dict.fromkeys(key for runs in scores.values() for values in runs.values() for key in values))
    record: dict[str, Any] = {"study": options.study, "tasks": options.tasks}
    if options.data is not None:
        record["data"] = options.data.name
    record["scores"] = scores
    write_json(record, learning.RESULTS / f"{options.study}-scores.json")
    print(table(scores, metrics))


if __name__ == "__main__":
    main()
