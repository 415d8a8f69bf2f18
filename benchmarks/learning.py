"""How fast recipes learn: validation loss at equal tokens, by studies of single changes, with seeds.

    lightlm prepare-data CORPUS --tokenizer train:8192 --out WORK/data/corpus-8k
    python benchmarks/learning.py --work WORK --list                     # the studies
    python benchmarks/learning.py --work WORK optimizer batch --budget 2h --jobs 2
    python benchmarks/learning.py --table optimizer                      # from the results that are committed
    python benchmarks/learning.py --table                                # of all studies, with a summary
    python benchmarks/learning.py --page docs/ladder.md                  # the same, with what each study says
    python benchmarks/learning.py --figure docs/assets/learning.png      # of the study `decisive`, and its sentences
    python benchmarks/learning.py --sentence decisive-again

A study is a sweep (`lightlm sweep`): contestants, recipes with changes, all on the same shards, order, tokens and
validation documents. learning/studies.yaml lists them. The same command resumes; a new contestant or seed is added.
Each call writes benchmarks/results/learning/STUDY.json, which holds all curves. evidence.py reads them,
evidence_page.py and evidence_figure.py show them.

Runs use one thread each (--jobs of them at a time), so that their numbers do not depend on the other runs. Data of
other vocabularies are WORK/data/corpus-4k, corpus-16k and corpus-32k, prepared with train:4096 and so on.
"""

import argparse
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
import evidence_figure
import evidence_page
import numpy as np
import yaml
from common import make_parser, write_json

HERE = Path(__file__).parent
TABLE = HERE / "learning" / "studies.yaml"
RESULTS = HERE / "results" / "learning"


@dataclass(frozen=True)
class Entry:
    """A contestant: the name of its recipe, in learning/ or one that LightLM ships, and its overrides."""

    recipe: str
    changes: list[str]

    @classmethod
    def read(cls, values: Any, recipe: str) -> "Entry":
        """Read a list of overrides, or a mapping with a `recipe` of its own and `changes`."""
        if isinstance(values, dict):
            return cls(values.get("recipe", recipe), _flat(values.get("changes") or []))
        return cls(recipe, _flat(values or []))

    @property
    def path(self) -> Path:
        own = HERE / "learning" / f"{self.recipe}.yaml"
        return own if own.is_file() else HERE.parent / "recipes" / f"{self.recipe}.yaml"


@dataclass(frozen=True)
class Study:
    """A sweep of single changes.

    Attributes:
        metric: what is compared: `val_loss`, or `val_bpb` where tokenizers differ.
        settings: overrides that all contestants share.
        contestants: by name; differences are to the first.
        seeds: by contestant.
        finding: what its results say, in words.
        keep: keep the checkpoints of finished runs.
    """

    name: str
    question: str
    metric: str
    settings: list[str]
    contestants: dict[str, Entry]
    seeds: dict[str, list[int]]
    finding: str
    keep: bool

    @classmethod
    def read(cls, name: str, values: dict[str, Any]) -> "Study":
        contestants = {key: Entry.read(entry, values["recipe"]) for key, entry in values["contestants"].items()}
        named = values.get("seeds_of", {})
        if unknown := sorted(set(named) - set(contestants)):
            raise SystemExit(f"{TABLE}: {name}: seeds_of names {', '.join(unknown)}, which are not contestants")
        return cls(
            name,
            values["question"],
            values.get("metric", "val_loss"),
            _flat(values.get("settings", [])),
            contestants,
            {key: named.get(key, values.get("seeds", [1])) for key in contestants},
            values.get("finding", "").strip(),
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
                Contestant(name, str(entry.path), (*study.settings, *entry.changes))
                for name, entry in study.contestants.items()
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
    from lightlm.machine import read_machine
    from lightlm.report.record import read_records

    found: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    places = {name: place for place, name in enumerate(study.contestants)}  # a sweep has them as they were added
    for line in sorted(results.lines, key=lambda line: places.get(line.contestant.name, len(places))):
        name = line.contestant.name
        entry = study.contestants.get(name)
        known = {"recipe": entry.recipe, "changes": entry.changes} if entry else {}
        known |= {"runs": {}, "tokens_per_second": {}}
        for seed, curves in results.curves[name].items():
            run = results.folder / "runs" / _cell_name(line.contestant, seed)
            machine = machine or read_machine(run)
            if "parameters" not in known:
                known["parameters"] = read_records([run])[0].parameters
            columns = [curves.column(key) for key in evidence.CURVE]
            steps = zip(*columns, strict=True)
            known["runs"][seed] = [[round(float(value), 5) for value in step] for step in steps if _measured(step)]
            # The median of the steps: pauses of the machine and other work on it change the clock, and not this.
            known["tokens_per_second"][seed] = round(float(np.nanmedian(curves.column("tokens_per_second"))), 1)
        states = {seed: state for seed, state in line.states.items() if state not in ("done", "waiting")}
        found[name] = known | ({"states": states} if states else {})
    return {
        "study": study.name,
        "question": study.question,
        "metric": study.metric,
        "settings": study.settings,
        "machine": {key: machine[key] for key in evidence.MACHINE if key in machine},
        "curve": evidence.CURVE,
        "contestants": found,
    }


def _measured(step: tuple[float, ...]) -> bool:
    return math.isfinite(step[evidence.CURVE.index("val_loss")])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY")
    parser.add_argument("--work", type=Path, help="folder of data and runs, outside the repository")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--budget", help="time for this call, such as 2h")
    parser.add_argument("--list", action="store_true", help="print the studies")
    parser.add_argument("--table", action="store_true", help="print committed results as Markdown, and run nothing")
    parser.add_argument("--page", type=Path, metavar="MD", help="write the page of all committed results")
    parser.add_argument(
        "--figure", type=Path, metavar="PNG", help="draw a study's curves; writes PNG and two beside it"
    )
    parser.add_argument("--sentence", action="store_true", help="print the share of tokens that each recipe needs")
    parser.add_argument("--metric", choices=list(evidence.UNITS), help="in place of the study's own")
    options = parser.parse_args()
    if options.table or options.page or options.figure or options.sentence:
        show(options)
        return
    studies = read_studies()
    if unknown := [name for name in options.studies if name not in studies]:
        parser.error(f"no study {', '.join(unknown)}; there are {', '.join(studies)}")
    chosen = [studies[name] for name in options.studies] or list(studies.values())
    if options.list:
        for study in chosen:
            runs = sum(len(seeds) for seeds in study.seeds.values())
            print(f"{study.name}: {study.question} {len(study.contestants)} contestants, {runs} runs")
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
        print(evidence_page.table(evidence.read(RESULTS, [study.name])[0], all_results(), options.metric))


def all_results() -> list[evidence.Record]:
    """Return the results of all studies, in the order of studies.yaml."""
    return evidence.read(RESULTS, list(read_studies()), missing_ok=True)


def page() -> str:
    """Return the page of all committed results, with the findings of studies.yaml."""
    return evidence_page.page(all_results(), {name: study.finding for name, study in read_studies().items()})


def show(options: argparse.Namespace) -> None:
    """Print, write or draw committed results."""
    if options.table:
        records = evidence.read(RESULTS, options.studies) if options.studies else all_results()
        print("\n".join(evidence_page.table(record, all_results(), options.metric) for record in records))
        print(evidence_page.summary(records))
    if options.page:
        options.page.write_text(page(), encoding="utf-8")
    if options.figure or options.sentence:
        for record in evidence.read(RESULTS, options.studies or ["decisive"]):
            print(evidence_page.sentences(record))
            if options.figure:
                for path in evidence_figure.draw(record, options.figure):
                    print(f"wrote {path}")


if __name__ == "__main__":
    main()
