"""How fast recipes learn: validation loss at equal tokens, by studies of single changes, with seeds.

    lightlm prepare-data CORPUS --tokenizer train:8192 --out WORK/data/corpus-8k
    python benchmarks/learning.py --work WORK --list                     # the studies
    python benchmarks/learning.py --work WORK optimizer batch --budget 2h --jobs 2
    python benchmarks/learning.py --work WORK stack --missing            # what the committed results lack
    python benchmarks/learning.py --table optimizer                      # from the results that are committed
    python benchmarks/learning.py --table                                # of all studies, with a summary
    python benchmarks/learning.py --page docs/ladder.md                  # the same, with what each study says
    python benchmarks/learning.py --figure docs/assets/learning.png      # of `decisive` and its repetition together
    python benchmarks/learning.py --sentence decisive                    # the share of tokens, of one of them

A study is a sweep (`lightlm sweep`): contestants, recipes with changes, all on the same shards, order, tokens and
validation documents. learning/studies.yaml lists them. The same command resumes; a new contestant or seed is added.
Each call writes benchmarks/results/learning/STUDY.json, which holds all curves: a finished run replaces that of its
contestant and seed, and the others stay. --missing trains only what the file lacks, so that another machine can
complete a study; prepare the same data there. The table lists the runs of other machines. evidence.py reads the
files, evidence_page.py and evidence_figure.py show them.

Runs use one thread each (--jobs of them at a time), so that their numbers do not depend on the other runs. Data of
other vocabularies are WORK/data/corpus-4k, corpus-16k and corpus-32k, prepared with train:4096 and so on.
"""

import argparse
import json
import math
import os
import shutil
import sys
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


def run_study(study: Study, work: Path, jobs: int, budget: float | None, *, missing: bool = False) -> bool:
    """Run what a study's sweep lacks, and write its results; return whether it is complete.

    Args:
        missing: leave out runs that the results have already.
    """
    from lightlm.cli.displays.sweep import SweepDisplay
    from lightlm.sweep.cells import Contestant
    from lightlm.sweep.run import Limits, Sweep

    known = _known(study) if missing else {}
    wanted = {
        name: [seed for seed in seeds if str(seed) not in _ended(known.get(name, {}))]
        for name, seeds in study.seeds.items()
    }
    if not any(wanted.values()):
        return True
    os.chdir(work)
    display = SweepDisplay()
    with Sweep.open(Path("sweeps") / study.name, Limits(jobs, budget), watch=display) as sweep:
        for seed in sorted(set().union(*wanted.values())):
            chosen = [
                Contestant(name, str(evidence.recipe_path(entry.recipe)), (*study.settings, *entry.changes))
                for name, entry in study.contestants.items()
                if seed in wanted[name]
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
    # Read again: hours may have passed, in which another call has written.
    write_json(_record(study, results, _known(study), wanted), RESULTS / f"{study.name}.json")
    return ending == "complete"


def _cell_name(contestant: Any, seed: int) -> str:
    from lightlm.sweep.cells import Cell

    return Cell(contestant, seed).name


def _ended(entry: dict[str, Any]) -> set[str]:
    """Return the seeds of a contestant that were trained to their end, or diverged."""
    diverged = {seed for seed, state in entry.get("states", {}).items() if state == "diverged"}
    return diverged | set(entry.get("runs", {}))


def _known(study: Study) -> dict[str, dict[str, Any]]:
    """Return what the results hold of a study's contestants as they are now, with the `machines` of their seeds.

    What was trained with other settings is named and left out.
    """
    path = RESULTS / f"{study.name}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"contestants": {}}
    kept = {}
    for name, found in record["contestants"].items():
        now, settings = study.contestants.get(name), record["settings"]
        if now and (found.get("recipe"), found.get("changes"), settings) == (now.recipe, now.changes, study.settings):
            elsewhere = found.pop("elsewhere", {})
            kept[name] = found | {"machines": {seed: elsewhere.get(seed, record["machine"]) for seed in found["runs"]}}
        elif found["runs"]:
            print(f"{path.name}: left out '{name}', which has other settings in {TABLE.name} now", file=sys.stderr)
    return kept


def _record(
    study: Study, results: Any, known: dict[str, dict[str, Any]], wanted: dict[str, list[int]]
) -> dict[str, Any]:
    """Return all that is known of a study, in a form that git can hold.

    Args:
        known: of `_known`.
        wanted: the seeds that this call has asked the sweep for; what else its folder holds is left alone.
    """
    from lightlm.machine import read_machine
    from lightlm.report.record import read_records

    found = dict(known)
    for line in results.lines:
        name = line.contestant.name
        if not (seeds := wanted.get(name)):
            continue
        entry = study.contestants[name]
        described = {"recipe": entry.recipe, "changes": entry.changes}
        merged = found.setdefault(name, described | {"runs": {}, "tokens_per_second": {}, "machines": {}})
        for number in seeds:
            if (curves := results.curves[name].get(number)) is None:
                continue
            run, seed = results.folder / "runs" / _cell_name(line.contestant, number), str(number)
            machine = read_machine(run)
            merged["machines"][seed] = {key: machine[key] for key in evidence.MACHINE if key in machine}
            if "parameters" not in merged:
                merged["parameters"] = read_records([run])[0].parameters
            columns = [curves.column(key) for key in evidence.CURVE]
            steps = zip(*columns, strict=True)
            merged["runs"][seed] = [[round(float(value), 5) for value in step] for step in steps if _measured(step)]
            # The median of the steps: pauses of the machine and other work on it change the clock, and not this.
            merged["tokens_per_second"][seed] = round(float(np.nanmedian(curves.column("tokens_per_second"))), 1)
        now = {str(seed): state for seed, state in line.states.items() if seed in seeds and state != "waiting"}
        states = now | {seed: state for seed, state in merged.pop("states", {}).items() if state == "diverged"}
        states = {seed: state for seed, state in states.items() if seed not in merged["runs"]}
        merged |= {"states": states} if states else {}
    places = {name: place for place, name in enumerate(study.contestants)}  # a sweep has them as they were added
    entries = dict(sorted(found.items(), key=lambda item: places.get(item[0], len(places))))
    return {
        "study": study.name,
        "question": study.question,
        "metric": study.metric,
        "settings": study.settings,
        "machine": _split_by_machine(entries),
        "curve": evidence.CURVE,
        "contestants": entries,
    }


def _split_by_machine(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the machine of most runs; replace the entries' `machines` by those `elsewhere`."""
    machines = [machine for entry in entries.values() for machine in entry["machines"].values()] or [{}]
    groups = [evidence.speed_facts(machine) for machine in machines]
    most = max(groups, key=groups.count)
    for entry in entries.values():
        by_seed = entry.pop("machines")
        elsewhere = {seed: machine for seed, machine in by_seed.items() if evidence.speed_facts(machine) != most}
        entry |= {"elsewhere": elsewhere} if elsewhere else {}
    return machines[groups.index(most)]


def _measured(step: tuple[float, ...]) -> bool:
    return math.isfinite(step[evidence.CURVE.index("val_loss")])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY")
    parser.add_argument("--work", type=Path, help="folder of data and runs, outside the repository")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--missing", action="store_true", help="train only what the committed results lack")
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
        if not run_study(study, options.work.resolve(), options.jobs, budget, missing=options.missing):
            print(f"{study.name} is not complete; the same command resumes it")
            break
        print(evidence_page.table(evidence.read(RESULTS, [study.name])[0], all_results(), options.metric))


def all_results() -> list[evidence.Record]:
    """Return the results of all studies, in the order of studies.yaml; contestants without any have no runs."""
    studies = read_studies()
    records = evidence.read(RESULTS, list(studies), missing_ok=True)
    for record in records:
        for name in studies[record["study"]].contestants:
            record["contestants"].setdefault(name, {"runs": {}})
    return records


def page() -> str:
    """Return the page of all committed results, with the findings and questions of studies.yaml."""
    studies = read_studies().items()
    findings, questions = ({name: getattr(study, key) for name, study in studies} for key in ("finding", "question"))
    return evidence_page.page(all_results(), findings, questions)


def show(options: argparse.Namespace) -> None:
    """Print, write or draw committed results."""
    if options.table:
        records = evidence.read(RESULTS, options.studies) if options.studies else all_results()
        print("\n".join(evidence_page.table(record, all_results(), options.metric) for record in records))
        print(evidence_page.summary(records))
    if options.page:
        options.page.write_text(page(), encoding="utf-8")
    if options.figure or options.sentence:
        records = evidence.read(RESULTS, options.studies or ["decisive", "decisive-again"])
        if len(records) == 1 + len(evidence.repeats(records[0], records)):
            records = [evidence.merge(records)]
        for record in records:
            print(evidence_page.sentences(record))
            if options.figure:
                for path in evidence_figure.draw(record, options.figure):
                    print(f"wrote {path}")


if __name__ == "__main__":
    main()
