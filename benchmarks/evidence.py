"""What the results of learning.py say: tables, a figure, and the share of tokens that a recipe needs.

A study with contestants named `RECIPE at 40%` compares recipes with a baseline: the best of its other contestants, such
as GPT-2 at several rates. Each is a training of its own, whose schedule ends there.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CURVE = ("tokens", "seconds", "val_loss", "val_bpb")
MACHINE = ("processor", "processors", "memory_gib", "device", "dtype", "system", "python", "torch", "lightlm")
UNITS = {"val_loss": ("nats per token", 3), "val_bpb": ("bits per byte", 4)}  # and digits
CONFIDENCE = 0.95
ENOUGH = 3  # degrees of freedom of a study's own spread; with fewer, the spread is that of all studies
HEAD = 0.1  # of the baseline's tokens, its initial fall, that does not set the limits of the loss axis

Record = dict[str, Any]
Values = dict[str, dict[str, float]]  # by contestant and seed


def read(results: Path, names: Sequence[str], *, missing_ok: bool = False) -> list[Record]:
    """Return the results of these studies.

    Raises:
        SystemExit: a study has none, unless `missing_ok`.
    """
    paths = {name: results / f"{name}.json" for name in names}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing and not missing_ok:
        raise SystemExit(f"{results} has no results of {', '.join(missing)}; run learning.py --work WORK first")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths.values() if path.is_file()]


def finals(record: Record, metric: str) -> Values:
    """Return the last value of a metric by contestant and seed."""
    column = record["curve"].index(metric)
    return {
        name: {seed: curve[-1][column] for seed, curve in entry["runs"].items() if curve}
        for name, entry in record["contestants"].items()
    }


def families(record: Record) -> dict[str, list[str]]:
    """Return the contestants named `RECIPE at N%` by recipe, shortest first."""
    found: dict[str, list[tuple[float, str]]] = {}
    for name in record["contestants"]:
        if match := re.fullmatch(r"(.+) at ([\d.]+)%", name):
            found.setdefault(match[1], []).append((float(match[2]), name))
    return {family: [name for _, name in sorted(members)] for family, members in found.items()}


def baseline(record: Record, metric: str) -> str:
    """Return what the others are compared with.

    That is the first contestant. In a study with families it is the best mean of the contestants outside of them; only
    those with the most seeds count.
    """
    members = {name for group in families(record).values() for name in group}
    values = finals(record, metric)
    candidates = [name for name in values if name not in members]
    if not members:
        return candidates[0]
    if not any(values[name] for name in candidates):
        raise SystemExit(f"{record['study']}: no contestant to compare with has a result yet")
    most = max(len(values[name]) for name in candidates)
    tried = [name for name in candidates if len(values[name]) == most]
    return min(tried, key=lambda name: statistics.fmean(values[name].values()))


def paired(record: Record, metric: str) -> Values:
    """Return each contestant minus the baseline, on the seeds that both have."""
    values, first = finals(record, metric), baseline(record, metric)
    return {
        name: {seed: value - values[first][seed] for seed, value in runs.items() if seed in values[first]}
        for name, runs in values.items()
        if name != first
    }


@dataclass(frozen=True)
class Spread:
    """The standard deviation of a difference between two contestants over seeds, and its degrees of freedom."""

    std: float
    freedom: int

    def margin(self, seeds: int) -> float:
        """Return the half width of the 95% interval of a mean difference over these seeds; NaN if unknown.

        The spread of two or three seeds says little, so all contestants share one. Intervals are not adjusted for the
        number of contestants.
        """
        from scipy import stats

        if not self.freedom or not seeds:
            return math.nan
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * self.std / math.sqrt(seeds)


def pool(records: Sequence[Record], metric: str) -> Spread:
    """Return the spread within the contestants of these studies that have several seeds."""
    groups = [list(runs.values()) for record in records for runs in paired(record, metric).values() if len(runs) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
    return Spread(math.sqrt(squares / freedom) if freedom else math.nan, freedom)


def spread_of(record: Record, others: Sequence[Record], metric: str) -> Spread:
    """Return the spread of a study; with too few seeds, that of all studies of its metric."""
    own = pool([record], metric)
    if own.freedom >= ENOUGH:
        return own
    alike = [each for each in others if each["metric"] == record["metric"] and each["study"] != record["study"]]
    return pool([record, *alike], metric)


def verdict(difference: float, margin: float, seeds: int) -> str:
    """Return `better` or `worse` for a difference beyond its margin, else `noise`. Less is better."""
    if not math.isfinite(margin):
        return "one seed"
    if abs(difference) <= margin:
        return "noise"
    return ("better" if difference < 0 else "worse") + (", one seed" if seeds == 1 else "")


@dataclass(frozen=True)
class Row:
    """A contestant's row: its values, and its difference to the baseline if a seed is paired."""

    name: str
    values: dict[str, float]
    difference: float
    margin: float
    verdict: str


def rows(record: Record, others: Sequence[Record], metric: str) -> list[Row]:
    """Return a study's rows: the baseline, then the best difference first, and what has no result last."""
    values, first, spread = finals(record, metric), baseline(record, metric), spread_of(record, others, metric)
    found = []
    for name, pairs in paired(record, metric).items():
        if pairs:
            difference, margin = statistics.fmean(pairs.values()), spread.margin(len(pairs))
            found.append(Row(name, values[name], difference, margin, verdict(difference, margin, len(pairs))))
        else:
            states = sorted(set(record["contestants"][name].get("states", {}).values()))
            found.append(Row(name, values[name], math.nan, math.nan, ", ".join(states) or "missing"))
    found.sort(key=lambda row: (math.isnan(row.difference), row.difference))
    return [Row(first, values[first], math.nan, math.nan, "baseline"), *found]


def table(record: Record, others: Sequence[Record] = (), metric: str | None = None, finding: str = "") -> str:
    """Return a study as Markdown: its finding, and every contestant with mean and standard deviation of its seeds."""
    metric = metric or record["metric"]
    unit, digits = UNITS[metric]
    lines = []
    for row in rows(record, others, metric):
        cells = (row.name, _mean(row.values, digits), str(len(row.values)), _difference(row, digits), row.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    own, used = pool([record], metric), spread_of(record, others, metric)
    note = "no contestant has several seeds"
    if used.freedom:
        whose = "" if used == own else " of all studies"
        note = f"standard deviation of a difference{whose}: {used.std:.{digits}f}, {used.freedom} degrees of freedom"
    heading = [f"### {record['study']}: {record['question']}", *([finding] if finding else []), ""]
    return "\n\n".join(heading) + (
        f"`{command(record)}`; {_common(record)}; {note}.\n\n"
        f"| contestant | {unit} | seeds | difference | |\n| --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )


def _difference(row: Row, digits: int) -> str:
    if not math.isfinite(row.difference):
        return ""
    margin = f" ± {row.margin:.{digits}f}" if math.isfinite(row.margin) else ""
    return f"{row.difference:+.{digits}f}{margin}"


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
    """Return one row per study: what is best, what else was tried, and on which machines."""
    lines = []
    for record in records:
        metric = record["metric"]
        unit, digits = UNITS[metric]
        first, *found = rows(record, records, metric)
        best = found[0] if found and math.isfinite(found[0].difference) else None
        gain = f"{_difference(best, digits)} {unit}" if best else ""
        counts = [row.verdict.split(",")[0] for row in found]
        tried = ", ".join(f"{counts.count(each)} {each}" for each in dict.fromkeys(sorted(counts)))
        runs = sum(len(row.values) for row in (first, *found))
        cells = (record["study"], first.name, best.name if best else "", gain, best.verdict if best else "", tried)
        lines.append(f"| {' | '.join(cells)} | {runs} |")
    machines = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None)
        for record in records
    )
    heading = "| study | baseline | best of the others | difference | | all others | runs |\n"
    return "\n".join(["### All studies", "", f"{heading}{'| --- ' * 7}|", *lines, "", *machines, ""])


PAGE = """# The ladder

What single changes of a recipe give: one study per question, on the same text in the same order, with the same
documents for validation. The defaults of the shipped recipes do not follow from it yet. Losers stay in the tables.

This page is made by `python benchmarks/learning.py --page docs/ladder.md` from `benchmarks/results/learning`;
`benchmarks/learning/studies.yaml` holds the settings of every contestant.

A difference is to the baseline of its study, paired by seed; less is better. ± is half of the 95% interval, from the
spread of all differences of the study, or of all studies where a study has too few seeds. `noise` is a difference
within it. A contestant without a value has not run to its end.
"""


def page(records: Sequence[Record], findings: dict[str, str]) -> str:
    """Return all studies as a page: the summary, then each with its finding."""
    tables = [table(record, records, finding=findings.get(record["study"], "")) for record in records]
    return "\n".join([PAGE, summary(records), *tables]).replace("\n### ", "\n## ")


@dataclass(frozen=True)
class Reached:
    """How many tokens a recipe needs for the baseline's final loss, as a share of the baseline's tokens.

    Attributes:
        share: NaN if the runs that ended lie all on one side; then `bound` says which.
        low, high: the 95% interval; NaN for a single seed.
        bound: such as "at most 40%", and `margin`, the mean difference there.
        flops, seconds: the recipe's cost per token over the baseline's.
    """

    share: float
    low: float
    high: float
    bound: str
    margin: float
    flops: float
    seconds: float


def reach(record: Record, family: str, metric: str = "val_loss") -> Reached:
    """Compute the share of the baseline's tokens at which a recipe has the baseline's final loss.

    Only the ends of trainings count, each with a schedule that ends there. Between the two ends whose mean losses
    enclose the baseline's, the loss is taken as linear in log(tokens). The interval is that of Student's t over the
    seeds: a seed moves the crossing by its paired difference there, divided by the slope of the means, and the slope's
    own error is neglected.
    """
    from scipy import stats

    first, entries = baseline(record, metric), record["contestants"]
    members = [name for name in families(record)[family] if paired(record, metric)[name]]
    if not members:
        raise SystemExit(f"{record['study']}: {family} has no result yet on a seed of {first}")
    flops, seconds = (_cost(entries[members[0]], cost) / _cost(entries[first], cost) for cost in ("flops", "seconds"))
    all_tokens = _last_tokens(entries[first])
    shares = [_last_tokens(entries[name]) / all_tokens for name in members]
    seeds = sorted(set.intersection(*(set(paired(record, metric)[name]) for name in members)))
    above_ES = np.array([[paired(record, metric)[name][seed] for seed in seeds] for name in members])
    means_E = above_ES.mean(1)
    unknown = math.nan, math.nan, math.nan
    if means_E[0] <= 0:
        return Reached(*unknown, f"at most {shares[0]:.0%}", means_E[0], flops, seconds)
    end = next((i for i in range(1, len(members)) if means_E[i] <= 0), None)
    if end is None:
        return Reached(*unknown, f"more than {shares[-1]:.0%}", means_E[-1], flops, seconds)
    start = end - 1
    slope = (means_E[end] - means_E[start]) / math.log(shares[end] / shares[start])  # nats per log(tokens), negative
    crossing = math.log(shares[start]) - means_E[start] / slope
    weight = (crossing - math.log(shares[start])) / math.log(shares[end] / shares[start])
    at_crossing_S = (1 - weight) * above_ES[start] + weight * above_ES[end]
    moved_S = crossing - at_crossing_S / slope
    low = high = math.nan
    if len(seeds) > 1:
        low, high = stats.t.interval(CONFIDENCE, len(seeds) - 1, crossing, stats.sem(moved_S))
    return Reached(math.exp(crossing), math.exp(low), math.exp(high), "", 0.0, flops, seconds)


def _cost(entry: dict[str, Any], cost: str) -> float:
    """Return FLOPs or seconds per token of a contestant."""
    if cost == "flops":
        return float(entry["parameters"]["flops_per_token"])
    return 1 / statistics.fmean(entry["tokens_per_second"].values())


def _last_tokens(entry: dict[str, Any]) -> float:
    return statistics.fmean(curve[-1][0] for curve in entry["runs"].values() if curve)


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
            interval = f" (95% interval {found.low:.0%} to {found.high:.0%})" if math.isfinite(found.low) else ""
            verb, needs = "reaches", f"with {found.share:.0%} of its tokens{interval}"
            needs += f", {found.share * found.flops:.0%} of its FLOPs and {found.share * found.seconds:.0%} of its time"
        lines.append(f"{family} {verb} {target} {needs}.")
    sizes = {first: first} | {family: members[0] for family, members in families(record).items()}
    texts = (f"{name} {_weights(record['contestants'][member]):,}" for name, member in sizes.items())
    return "\n".join([*lines, f"Active parameters without embeddings and head: {', '.join(texts)}."])


def _weights(entry: dict[str, Any]) -> int:
    return int(entry["parameters"]["active"] - entry["parameters"]["embedding"])


def draw(record: Record, path: Path) -> list[Path]:
    """Draw the loss over tokens as `path`, over FLOPs and over time as two files beside it; return all three."""
    from lightlm.report.charts.chart import compute_unit

    first, entries = baseline(record, "val_loss"), record["contestants"]
    names = [first, *(name for members in families(record).values() for name in members)]
    most = max(_cost(entries[name], "flops") * _last_tokens(entries[name]) for name in names if entries[name]["runs"])
    size, unit = compute_unit(most)
    axes = {
        "": ("tokens", "training tokens", lambda entry: 1.0),
        "-flops": ("FLOPs", f"training {unit}", lambda entry: _cost(entry, "flops") / size),
        "-time": ("time", "training time (min)", lambda entry: _cost(entry, "seconds") / 60),
    }
    paths = []
    for suffix, (title, label, scale) in axes.items():
        chart = _chart(record, f"Validation loss over {title}", label, scale)
        if not suffix:
            _mark_shares(chart, record)
            chart.quantities("x")
        paths.append(path.with_name(f"{path.stem}{suffix}{path.suffix}"))
        paths[-1].write_bytes(chart.finish().png())
    return paths


def _chart(record: Record, title: str, x_label: str, scale: Any) -> Any:
    """Return a chart of the baseline and the families: means with the range of the seeds, and the ends of trainings."""
    from lightlm.report.charts.chart import Chart

    first, entries = baseline(record, "val_loss"), record["contestants"]
    groups = {
        f"{first}, best of {_settings(record)}" if _settings(record) > 1 else first: [first],
        **families(record),
    }
    chart = Chart(title, x_label, "nats per token", name_all=True)
    tokens, loss = record["curve"].index("tokens"), record["curve"].index("val_loss")
    highest, lowest, widest = -math.inf, math.inf, 0.0
    head = HEAD * _last_tokens(entries[first])
    for color, (group, members) in enumerate(groups.items()):
        for name in members:
            if not (runs := [curve for curve in entries[name]["runs"].values() if curve]):
                continue
            length = min(map(len, runs))
            curves_SPC = np.array([curve[:length] for curve in runs])
            x_P = curves_SPC[0, :, tokens] * scale(entries[name])
            y_SP = curves_SPC[:, :, loss]
            chart.line(group, x_P, y_SP.mean(0), color)
            chart.band(x_P, y_SP.min(0), y_SP.max(0), color)
            chart.points("", x_P[-1:], y_SP.mean(0)[-1:], color, joined=False)
            shown = y_SP[:, curves_SPC[0, :, tokens] >= head]
            highest, lowest = max(highest, shown.max()), min(lowest, shown.min())
            widest = max(widest, x_P[-1])
    target = statistics.fmean(finals(record, "val_loss")[first].values())
    chart.levels(f"final loss of {first}", np.array([widest / 2]), np.array([target]), widest)
    margin = 0.06 * (highest - lowest)
    chart.axes.set_ylim(lowest - 2 * margin, highest + margin)  # below is room for the shares
    chart.axes.set_xlim(0, 1.03 * widest)
    return chart


def _settings(record: Record) -> int:
    members = {name for group in families(record).values() for name in group}
    return len(set(record["contestants"]) - members)


def _mark_shares(chart: Any, record: Record) -> None:
    """Mark where each family has the baseline's final loss."""
    from lightlm.report.charts.chart import run_color

    first = baseline(record, "val_loss")
    target = statistics.fmean(finals(record, "val_loss")[first].values())
    for color, family in enumerate(families(record), start=1):
        found = reach(record, family)
        if not found.bound:
            x = found.share * _last_tokens(record["contestants"][first])
            chart.axes.plot([x], [target], marker="D", markersize=7, color=run_color(color), zorder=5)
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "weight": "bold"}
            text = f"{found.share:.0%}"  # below the line: the curves come from above
            chart.axes.annotate(text, (x, target), xytext=(0, -18), color=run_color(color), **style)
