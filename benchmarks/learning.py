"""How fast recipes learn: validation loss at equal tokens, by studies of single changes, with seeds.

    lightlm prepare-data CORPUS --tokenizer train:8192 --out WORK/data/corpus-8k
    python benchmarks/learning.py --work WORK --list                     # the studies, and how far they are
    python benchmarks/learning.py --work WORK optimizer batch --budget 2h --jobs 2
    python benchmarks/learning.py --table optimizer                      # from the results that are committed
    python benchmarks/learning.py --figure docs/learning.png

A study is a sweep (`lightlm sweep`): contestants of one recipe with changes, all on the same shards, order, tokens and
validation documents. learning/studies.yaml lists them. The same command resumes; a new contestant or seed is added.
Each call writes benchmarks/results/learning/STUDY.json, which holds all curves. Differences are paired by seed, and
their spread is pooled over the contestants of a study, since two or three seeds alone say little.

Runs use one thread each (--jobs of them at a time), so that their numbers do not depend on the other runs. Data of
other vocabularies are WORK/data/corpus-4k, corpus-16k and corpus-32k, prepared with train:4096 and so on.
"""

import json
import math
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import make_parser, write_json

HERE = Path(__file__).parent
TABLE = HERE / "learning" / "studies.yaml"
RESULTS = HERE / "results" / "learning"
CURVE = ("tokens", "seconds", "val_loss", "val_bpb")
NOISE = 1.96  # standard errors within which a difference counts as noise


@dataclass(frozen=True)
class Study:
    """A sweep of single changes.

    Attributes:
        settings: overrides that all contestants share.
        contestants: overrides by name; differences are to the first.
        seeds: by contestant, or for all.
        keep: keep the checkpoints of finished runs.
    """

    name: str
    question: str
    recipe: str
    settings: list[str]
    contestants: dict[str, list[str]]
    seeds: dict[str, list[int]]
    keep: bool

    @classmethod
    def read(cls, name: str, values: dict[str, Any]) -> "Study":
        contestants = {key: _flat(changes or []) for key, changes in values["contestants"].items()}
        more = values.get("more_seeds", {})
        seeds = {key: more.get(key, values.get("seeds", [1])) for key in contestants}
        return cls(
            name,
            values["question"],
            str(HERE / "learning" / f"{values['recipe']}.yaml"),
            _flat(values.get("settings", [])),
            contestants,
            seeds,
            values.get("keep", False),
        )


def _flat(changes: list[Any]) -> list[str]:
    """Return changes of which some are lists by a YAML alias."""
    return [text for change in changes for text in (_flat(change) if isinstance(change, list) else [change])]


def read_studies() -> dict[str, Study]:
    """Return the studies of studies.yaml by name."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: Study.read(name, values) for name, values in table["studies"].items()}


def run_study(study: Study, work: Path, jobs: int, budget: float | None) -> bool:
    """Run what is missing of a study and write its results; return whether it is complete."""
    from lightlm.cli.displays.sweep import SweepDisplay
    from lightlm.sweep.cells import Contestant
    from lightlm.sweep.run import Limits, Sweep

    os.chdir(work)
    display = SweepDisplay()
    with Sweep.open(Path("sweeps") / study.name, Limits(jobs, budget), watch=display) as sweep:
        for seed in sorted({seed for seeds in study.seeds.values() for seed in seeds}):
            chosen = [
                Contestant(name, study.recipe, (*study.settings, *changes))
                for name, changes in study.contestants.items()
                if seed in study.seeds[name]
            ]
            sweep.add(chosen, [seed])
        with display:
            ending = sweep.run()
        results = sweep.results()
        for line in results.lines:
            for seed, state in line.states.items():
                if state == "done" and not study.keep:
                    run = sweep.folder.path / "runs" / f"{_cell_name(line.contestant, seed)}"
                    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    write_json(_record(study, results), RESULTS / f"{study.name}.json")
    return ending == "complete"


def _cell_name(contestant: Any, seed: int) -> str:
    from lightlm.sweep.cells import Cell

    return Cell(contestant, seed).name


def _record(study: Study, results: Any) -> dict[str, Any]:
    """Return all that is known of a study, in a form that git can hold."""
    found: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for line in results.lines:
        runs = results.curves[line.contestant.name]
        entry: dict[str, Any] = {"changes": study.contestants.get(line.contestant.name), "runs": {}}
        for seed, curves in runs.items():
            run = results.folder / "runs" / _cell_name(line.contestant, seed)
            machine = json.loads((run / "machine.json").read_text(encoding="utf-8"))
            facts = facts or {key: machine.get(key) for key in ("processor", "cpu", "python", "torch", "lightlm")}
            entry |= {key: machine[key] for key in ("parameters", "active_parameters", "flops_per_token")}
            known = [i for i in range(len(curves)) if math.isfinite(curves.column("val_loss")[i])]
            columns = {key: curves.column(key) for key in CURVE}
            entry["runs"][seed] = [[_short(columns[key][i]) for key in CURVE] for i in known]
        states = {seed: state for seed, state in line.states.items() if state not in ("done", "waiting")}
        found[line.contestant.name] = entry | ({"states": states} if states else {})
    return {
        "study": study.name,
        "question": study.question,
        "recipe": Path(study.recipe).name,
        "settings": study.settings,
        "machine": facts,
        "curve": CURVE,
        "contestants": found,
    }


def _short(value: float) -> float:
    return round(float(value), 5)


def finals(record: dict[str, Any], metric: str = "val_loss") -> dict[str, dict[str, float]]:
    """Return the last value of a metric by contestant and seed."""
    column = record["curve"].index(metric)
    return {
        name: {seed: curve[-1][column] for seed, curve in entry["runs"].items() if curve}
        for name, entry in record["contestants"].items()
    }


def table(record: dict[str, Any], metric: str = "val_loss") -> str:
    """Return a study as a Markdown table; differences are to the first contestant, paired by seed."""
    values = finals(record, metric)
    first, *others = values
    pairs = {
        name: [values[name][seed] - values[first][seed] for seed in values[name] if seed in values[first]]
        for name in others
    }
    spreads = [statistics.variance(found) for found in pairs.values() if len(found) > 1]
    freedom = sum(len(found) - 1 for found in pairs.values() if len(found) > 1)
    weights = [len(found) - 1 for found in pairs.values() if len(found) > 1]
    pooled = math.sqrt(sum(s * w for s, w in zip(spreads, weights, strict=True)) / freedom) if freedom else math.nan
    rows = [f"| {first} | {_mean(values[first])} | {len(values[first])} | | baseline |"]
    ranked = sorted(others, key=lambda name: statistics.fmean(pairs[name]) if pairs[name] else math.inf)
    for name in ranked:
        if not pairs[name]:
            states = record["contestants"][name].get("states", {})
            rows.append(f"| {name} | {_mean(values[name])} | {len(values[name])} | | {_states(states)} |")
            continue
        difference = statistics.fmean(pairs[name])
        error = pooled / math.sqrt(len(pairs[name]))
        if len(pairs[name]) < 2:
            verdict = "one seed"
        else:
            verdict = "noise" if abs(difference) <= NOISE * error else "better" if difference < 0 else "worse"
        interval = f" ± {NOISE * error:.3f}" if math.isfinite(error) else ""
        rows.append(
            f"| {name} | {_mean(values[name])} | {len(pairs[name])} | {difference:+.3f}{interval} | {verdict} |"
        )
    unit = {"val_loss": "nats per token", "val_bpb": "bits per byte"}[metric]
    heading = f"**{record['study']}**: {record['question']}\n\n| contestant | {unit} | seeds | difference | |\n"
    return heading + "| --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _mean(values: dict[str, float]) -> str:
    if not values:
        return ""
    spread = f" ({statistics.stdev(values.values()):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.3f}{spread}"


def _states(states: dict[str, str]) -> str:
    return ", ".join(sorted(set(states.values()))) or "missing"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY")
    parser.add_argument("--work", type=Path, help="folder of data and runs, outside the repository")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--budget", help="time for this call, such as 2h")
    parser.add_argument("--list", action="store_true", help="print the studies")
    parser.add_argument("--table", action="store_true", help="print committed results as Markdown, and run nothing")
    parser.add_argument("--metric", default="val_loss", choices=["val_loss", "val_bpb"])
    options = parser.parse_args()
    studies = read_studies()
    if unknown := [name for name in options.studies if name not in studies]:
        parser.error(f"no study {', '.join(unknown)}; there are {', '.join(studies)}")
    chosen = [studies[name] for name in options.studies] or list(studies.values())
    if options.list:
        for study in chosen:
            runs = sum(len(seeds) for seeds in study.seeds.values())
            print(f"{study.name}: {study.question} {len(study.contestants)} contestants, {runs} runs")
        return
    if options.table:
        for study in chosen:
            if (path := RESULTS / f"{study.name}.json").is_file():
                print(table(json.loads(path.read_text(encoding="utf-8")), options.metric))
        return
    if options.work is None:
        parser.error("--work is needed to run studies")
    from lightlm.sweep.values import read_duration

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    RESULTS.mkdir(parents=True, exist_ok=True)
    budget = read_duration(options.budget) if options.budget else None
    for study in chosen:
        if not run_study(study, options.work.resolve(), options.jobs, budget):
            print(f"{study.name} is not complete; the same command resumes it")
            break
        print(table(json.loads((RESULTS / f"{study.name}.json").read_text(encoding="utf-8")), options.metric))


if __name__ == "__main__":
    main()
