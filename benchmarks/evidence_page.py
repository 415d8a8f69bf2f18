"""The results of learning.py in words: a table per study, the page of all, and the share of tokens a recipe needs."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from evidence import (
    NOT_TRAINED,
    UNITS,
    Record,
    Row,
    baseline,
    families,
    finals,
    last_tokens,
    paired,
    pool,
    reach,
    repeats,
    rows,
    speed_facts,
    spread_of,
)


def table(record: Record, others: Sequence[Record] = (), metric: str | None = None, finding: str = "") -> str:
    """Return a study as Markdown: its finding, and every contestant with mean and standard deviation of its seeds."""
    metric = metric or record["metric"]
    unit, digits = UNITS[metric]
    lines = []
    found = rows(record, others, metric)
    stepwise = any(row.step for row in found)
    for row in found:
        if row.verdict != NOT_TRAINED:
            cells = (row.name, _mean(row.values, digits), str(len(row.values)), _difference(row, digits), row.verdict)
            lines.append(f"| {' | '.join((*cells, *([_step(row, digits)] if stepwise else [])))} |")
    own, used = pool([record], metric), spread_of(record, others, metric)
    note = "no contestant has several seeds"
    if used.freedom:
        whose = (
            "" if used == own else " of this study and its repetition" if repeats(record, others) else " of all studies"
        )
        note = f"standard deviation of a difference{whose}: {used.std:.{digits}f}, {used.freedom} degrees of freedom"
    heading = [f"### {record['study']}: {record['question']}", *([finding] if finding else []), ""]
    return "\n\n".join(heading) + (
        f"`{command(record)}`; {_common(record)}; {note}.\n\n"
        f"| contestant | {unit} | seeds | difference | |{' beside the nearest |' if stepwise else ''}\n"
        f"|{' --- |' * (6 if stepwise else 5)}\n"
        + "\n".join(lines)
        + "\n"
        + "".join(f"\n{line}\n" for line in (*_not_trained(found), *_elsewhere(record)))
    )


def _not_trained(found: Sequence[Row]) -> list[str]:
    names = [row.name for row in found if row.verdict == NOT_TRAINED]
    return [f"Not trained yet: {'; '.join(names)}."] if names else []


def _elsewhere(record: Record) -> list[str]:
    """Return which runs were trained on another machine than the study's."""
    found: dict[str, list[str]] = {}
    for name, entry in record["contestants"].items():
        seeds: dict[str, list[str]] = {}
        for seed, machine in entry.get("elsewhere", {}).items():
            seeds.setdefault(_machine(speed_facts(machine)), []).append(seed)
        for machine, group in seeds.items():
            found.setdefault(machine, []).append(f"{name}, seed {' and '.join(group)}")
    return [f"On another machine ({machine}): {'; '.join(runs)}." for machine, runs in found.items()]


def _machine(facts: dict[str, Any]) -> str:
    """Return a machine in words."""
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def _difference(row: Row, digits: int) -> str:
    if not math.isfinite(row.difference):
        return ""
    margin = f" ± {row.margin:.{digits}f}" if math.isfinite(row.margin) else ""
    return f"{row.difference:+.{digits}f}{margin}"


def _step(row: Row, digits: int) -> str:
    """Return a row's difference to the contestant that is nearest to it, in words."""
    return f"{row.step.name}: {_difference(row.step, digits)}, {row.step.verdict}" if row.step else ""


def command(record: Record) -> str:
    """Return the command that made a study's results."""
    return f"python benchmarks/learning.py --work WORK {record['study']}"


def _mean(values: dict[str, float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ({statistics.stdev(values.values()):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.{digits}f}{spread}"


def _common(record: Record) -> str:
    """Return the recipes of a study, the settings that all contestants share, and the most tokens of a run."""
    from lightlm.quantities import format_quantity

    entries = record["contestants"].values()
    recipes = dict.fromkeys(f"{entry['recipe']}.yaml" for entry in entries if "recipe" in entry)
    tokens = max((curve[-1][0] for entry in entries for curve in entry["runs"].values() if curve), default=0)
    shared = [f"`{' '.join(record['settings'])}`"] if record["settings"] else []
    return ", ".join([*recipes, *shared, f"{format_quantity(tokens)} tokens"])


def summary(records: Sequence[Record]) -> str:
    """Return one row per study: what is best at as many tokens, what else was tried, and on which machines."""
    lines = []
    for record in records:
        metric = record["metric"]
        unit, digits = UNITS[metric]
        first, *found = rows(record, records, metric)
        comparable = metric == "val_loss" and bool(first.values)
        longest = 1.02 * last_tokens(record["contestants"][first.name]) if comparable else math.inf
        fair = (row for row in found if math.isfinite(row.difference))
        best = next((row for row in fair if last_tokens(record["contestants"][row.name]) <= longest), None)
        gain = f"{_difference(best, digits)} {unit}" if best else ""
        counts = [(row.step or row).verdict.split(",")[0] for row in found]
        tried = ", ".join(f"{counts.count(each)} {each}" for each in dict.fromkeys(sorted(counts)))
        runs = sum(len(row.values) for row in (first, *found))
        cells = (record["study"], first.name, best.name if best else "", gain, best.verdict if best else "", tried)
        lines.append(f"| {' | '.join(cells)} | {runs} |")
    studies: dict[str, list[str]] = {}
    for record in records:
        if record["machine"]:
            studies.setdefault(_machine(record["machine"]), []).append(f"`{record['study']}`")
    machines = [f"- {', '.join(names)}: {machine}" for machine, names in studies.items()]
    heading = "| study | baseline | best of the others | difference | | all others, beside the nearest | runs |\n"
    return "\n".join(["### All studies", "", f"{heading}{'| --- ' * 7}|", *lines, "", "Machines:", "", *machines, ""])


PAGE = """# The ladder

What single changes of a recipe give: one study per question, on the same text in the same order, with the same
documents for validation. `demo`, `moe-demo` and `speedrun` take optimizer, betas and schedule from it; `lightlm-30m`,
`lightlm` and `moe` take Muon and the schedule. Losers stay in the tables.

This page is made by `python benchmarks/learning.py --page docs/ladder.md` from `benchmarks/results/learning`;
`benchmarks/learning/studies.yaml` holds the settings of every contestant.

A difference is to the baseline of its study, paired by seed; less is better. ± is half of the 95% interval, from the
spread of all differences of the study, or of all studies where a study has too few seeds. `noise` is a difference
within it. `better` and `worse` take three seeds; `lower` and `higher` are beyond the interval with one or two.

Some contestants change several settings at once. If an earlier contestant of the study is more similar than the
baseline, and differs by at most two settings, the last column shows the difference to that one, and the summary counts
that verdict.

In the summary, the best of the others is the best of those that read at most 2% more tokens than the baseline. In a
study of bits per byte it is the best of all, because vocabularies cut the same text into different numbers of tokens.

The intervals say how far other seeds would move a difference, not how far other documents would: all losses are of the
same 45 documents (977 KB). They are not adjusted for the number of contestants, so the best of many looks better than
it is, and a single seed is judged by the spread of other studies. The differences of a study share the runs of its
baseline, so they have fewer independent degrees of freedom than are counted.

In the names, 4K is `train.batch_tokens` and "rate" the learning rate; "initial spread" is `model.init_std`; "tables"
are those of token and position embeddings, "vectors" the gains of norms and biases.
"""


def page(records: Sequence[Record], findings: dict[str, str], questions: dict[str, str]) -> str:
    """Return the page of all studies: a summary, each with its finding, and the questions without results."""
    records = [record | {"question": questions.get(record["study"], record["question"])} for record in records]
    tables = [table(record, records, finding=findings.get(record["study"], "")) for record in records]
    trained = {record["study"] for record in records}
    missing = [f"- `{name}`: {question}" for name, question in questions.items() if name not in trained]
    last = ["### Studies without results yet", "", *missing, ""] if missing else []
    return "\n".join([PAGE, summary(records), *tables, *last]).replace("\n### ", "\n## ")


def sentences(record: Record, metric: str = "val_loss") -> str:
    """Return how many tokens each recipe needs for the tuned baseline's final loss, and what is compared."""
    first, values = baseline(record, metric), finals(record, metric)
    unit, digits = UNITS[metric]
    target = f"the final loss of {first} ({_mean(values[first], digits)} {unit}, {len(values[first])} seeds)"
    lines = []
    for family in families(record):
        found = reach(record, family, metric)
        if found.bound:
            needs = f"with {found.bound} of its tokens ({found.margin:+.{digits}f} {unit} there)"
            verb = "reaches" if found.bound.startswith("at most") else "would reach"
        else:
            interval = f" (95% interval {found.low:.1%} to {found.high:.1%})" if math.isfinite(found.low) else ""
            verb, needs = "reaches", f"with {found.share:.1%} of its tokens{interval}"
            needs += f", {found.share * found.flops:.0%} of its FLOPs"
            if math.isfinite(found.seconds):
                needs += f" and {found.share * found.seconds:.0%} of its time"
        lines.append(f"{family} {verb} {target} {needs}.")
    pairs = paired(record, metric)
    members = [name for group in families(record).values() for name in group if pairs[name]]
    ends = [f"{name} {statistics.fmean(pairs[name].values()):+.{digits}f}" for name in members]
    lines.append(f"Ends beside it, {unit}: {', '.join(ends)}.")
    sizes = {first: first} | {family: members[0] for family, members in families(record).items()}
    texts = (f"{name} {_weights(record['contestants'][member]):,}" for name, member in sizes.items())
    return "\n".join([*lines, f"Active parameters without embeddings and head: {', '.join(texts)}."])


def _weights(entry: dict[str, Any]) -> int:
    return int(entry["parameters"]["active"] - entry["parameters"]["embedding"])
