"""What the results of learning.py say: differences with intervals, and the share of tokens that a recipe needs.

A study with contestants named `RECIPE at 40%` compares recipes with a baseline: the best of its other contestants, such
as GPT-2 at several rates. Each is a training of its own, whose schedule ends there. `RECIPE in float32 at 40%` is the
same recipe on a machine of another precision.
"""

import functools
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
MACHINE = (
    "processor",
    "cpu_features",
    "processors",
    "memory_gib",
    "device",
    "dtype",
    "system",
    "python",
    "torch",
    "lightlm",
)
SPEED = ("processor", "cpu_features", "processors", "device", "dtype", "torch")  # what a speed depends on
UNITS = {"val_loss": ("nats per token", 3), "val_bpb": ("bits per byte", 4)}  # and digits
CONFIDENCE = 0.95
NOT_TRAINED = "not trained"  # the verdict of a contestant without a result
ENOUGH = 3  # degrees of freedom of a study's own spread; with fewer, the spread is that of all studies
_FEW = 2  # changes between contestants whose difference is worth a look
SEEDS = 3  # of a difference that is called better or worse; with fewer it is lower or higher

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


def speed_facts(machine: dict[str, Any]) -> dict[str, Any]:
    """Return what the speed of a run depends on, of the facts about its machine."""
    return {key: machine[key] for key in SPEED if key in machine}


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
        if match := re.fullmatch(r"(.+?)(?: in float32)? at ([\d.]+)%", name):
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


def minus(values: Values, name: str, other: str) -> dict[str, float]:
    """Return a contestant minus another one, on the seeds that both have."""
    return {seed: value - values[other][seed] for seed, value in values[name].items() if seed in values[other]}


def paired(record: Record, metric: str) -> Values:
    """Return each contestant minus the baseline, on the seeds that both have."""
    values, first = finals(record, metric), baseline(record, metric)
    return {name: minus(values, name, first) for name in values if name != first}


def nearest(record: Record, metric: str) -> dict[str, str]:
    """Return the contestant of which each is a single change, where that is not the baseline.

    Without one, that of which it is two changes. Only contestants that are listed before it count, the last of equals.
    A study with families has none: its contestants are different recipes.
    """
    if families(record):
        return {}
    first, entries, found = baseline(record, metric), record["contestants"], {}
    values = finals(record, metric)
    names = [name for name in entries if values[name] and name != first]
    for place, name in enumerate(names):
        others = [first, *reversed(names[:place])]
        changes = [_changed(entries[name], entries[other]) for other in others]
        if changes.index(min(changes)) > 0 and min(changes) <= _FEW:
            found[name] = others[changes.index(min(changes))]
    return found


def _changed(one: dict[str, Any], other: dict[str, Any]) -> int:
    """Return the number of settings in which two contestants differ."""
    settings = [
        dict(change.partition("=")[::2] for change in entry["changes"]) | {"recipe": entry["recipe"]}
        for entry in (one, other)
    ]
    return sum(settings[0].get(key) != settings[1].get(key) for key in settings[0].keys() | settings[1].keys())


def merge(records: Sequence[Record]) -> Record:
    """Return studies of the same contestants with different seeds as one.

    Raises:
        SystemExit: a seed is in several of them.
    """
    first, *others = records
    entries = {name: dict(entry) for name, entry in first["contestants"].items()}
    for record in others:
        same = speed_facts(record["machine"]) == speed_facts(first["machine"])
        for name, entry in record["contestants"].items():
            known = entries.setdefault(name, entry | {"runs": {}, "tokens_per_second": {}, "elsewhere": {}})
            if twice := sorted(known["runs"].keys() & entry["runs"].keys()):
                raise SystemExit(f"{first['study']} and {record['study']} both have seed {twice[0]} of {name}")
            machines = {} if same else dict.fromkeys(entry["runs"], record["machine"])
            for key, more in (("runs", entry["runs"]), ("tokens_per_second", entry["tokens_per_second"])):
                known[key] = known[key] | more
            known["elsewhere"] = known.get("elsewhere", {}) | machines | entry.get("elsewhere", {})
    return first | {"study": " and ".join(record["study"] for record in records), "contestants": entries}


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
    """Return the spread of a study and of those that repeat it; with too few seeds, that of all of its metric."""
    own = pool([record, *repeats(record, others)], metric)
    if own.freedom >= ENOUGH:
        return own
    alike = [each for each in others if each["metric"] == record["metric"] and each["study"] != record["study"]]
    return pool([record, *alike], metric)


def repeats(record: Record, others: Sequence[Record]) -> list[Record]:
    """Return the studies that train a study's recipes again with other seeds."""

    def recipes(each: Record) -> set[tuple[str, tuple[str, ...]]]:
        names = {name for members in families(each).values() for name in members}
        entries = [each["contestants"][name] for name in names]
        return {(entry["recipe"], tuple(entry["changes"])) for entry in entries if entry["runs"]}

    own = recipes(record)
    return [each for each in others if each["study"] != record["study"] and own and recipes(each) == own]


def verdict(difference: float, margin: float, seeds: int) -> str:
    """Return `better` or `worse` for a difference beyond its margin, else `noise`. Less is better.

    With fewer than three seeds it is `lower` or `higher`.
    """
    if not math.isfinite(margin):
        return "one seed"
    if abs(difference) <= margin:
        return "noise"
    if seeds >= SEEDS:
        return "better" if difference < 0 else "worse"
    return f"{'lower' if difference < 0 else 'higher'}, {'one seed' if seeds == 1 else 'two seeds'}"


@dataclass(frozen=True)
class Row:
    """A contestant's row: its values, and its difference to the baseline if a seed is paired.

    Attributes:
        step: the row's difference to the contestant that is nearest to it, where that is not the baseline; its name is
            that contestant's.
    """

    name: str
    values: dict[str, float]
    difference: float
    margin: float
    verdict: str
    step: "Row | None" = None


def rows(record: Record, others: Sequence[Record], metric: str) -> list[Row]:
    """Return a study's rows: the baseline, then the best difference first, and what has no result last."""
    values, first, spread = finals(record, metric), baseline(record, metric), spread_of(record, others, metric)
    near, found = nearest(record, metric), []

    def row(name: str, pairs: dict[str, float], step: Row | None = None) -> Row:
        difference, margin = statistics.fmean(pairs.values()), spread.margin(len(pairs))
        return Row(name, values[name], difference, margin, verdict(difference, margin, len(pairs)), step)

    for name, pairs in paired(record, metric).items():
        if pairs:
            beside = minus(values, name, near[name]) if name in near else {}
            found.append(row(name, pairs, row(near[name], beside) if beside else None))
        else:
            states = sorted(set(record["contestants"][name].get("states", {}).values()))
            found.append(Row(name, values[name], math.nan, math.nan, ", ".join(states) or NOT_TRAINED))
    found.sort(key=lambda row: (math.isnan(row.difference), row.difference))
    return [Row(first, values[first], math.nan, math.nan, "baseline"), *found]


@dataclass(frozen=True)
class Reached:
    """How many tokens a recipe needs for the baseline's final loss, as a share of the baseline's tokens.

    Attributes:
        share: NaN if the runs that ended lie all on one side; then `bound` says which.
        low, high: the 95% interval; NaN for a single seed.
        bound: such as "at most 40%", and `margin`, the mean difference there.
        flops, seconds: the recipe's cost per token over the baseline's; NaN seconds if they share no machine.
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
    pairs = paired(record, metric)
    # With a seed less than the others an end would take that seed from all.
    most = max(len(pairs[name]) for name in families(record)[family])
    members = [name for name in families(record)[family] if len(pairs[name]) == most > 0]
    if not members:
        raise SystemExit(f"{record['study']}: {family} has no result yet on a seed of {first}")
    flops = cost_of(record, members[0], "flops") / cost_of(record, first, "flops")
    timed = [cost for name in members if math.isfinite(cost := cost_of(record, name, "seconds"))]
    seconds = (statistics.median(timed) if timed else math.nan) / cost_of(record, first, "seconds")
    all_tokens = last_tokens(entries[first])
    shares = [last_tokens(entries[name]) / all_tokens for name in members]
    seeds = sorted(set.intersection(*(set(pairs[name]) for name in members)))
    above_ES = np.array([[pairs[name][seed] for seed in seeds] for name in members])
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


def cost_of(record: Record, name: str, cost: str) -> float:
    """Return FLOPs or seconds per token of a contestant; NaN seconds if no run was on the study's machine.

    FLOPs are those of the forward and backward pass and of the optimizer's matrix products.
    """
    entry = record["contestants"][name]
    if cost == "flops":
        changes = (*record["settings"], *entry["changes"])
        return float(entry["parameters"]["flops_per_token"]) + optimizer_flops(entry["recipe"], changes)
    elsewhere = entry.get("elsewhere", {})
    speeds = [speed for seed, speed in entry["tokens_per_second"].items() if seed not in elsewhere]
    return 1 / statistics.median(speeds) if speeds else math.nan  # other work slows single runs


@functools.cache
def optimizer_flops(recipe: str, changes: tuple[str, ...]) -> float:
    """Return the operations of Muon's orthogonalization per training token; 0 with AdamW.

    A step of the iteration on an R x C matrix, R <= C, takes three products: 4 R^2 C + 2 R^3 operations.
    """
    import torch

    from lightlm.model.transformer import Transformer
    from lightlm.optim.groups import MATRICES, parameter_groups
    from lightlm.optim.muon import MuonSettings
    from lightlm.recipe import load_recipe

    parsed = load_recipe(str(recipe_path(recipe)), [*changes, "model.vocab_size=256"], lambda note: None)
    if not isinstance(parsed.optimizer, MuonSettings):
        return 0.0
    with torch.device("meta"):
        groups = parameter_groups(Transformer(parsed.model), parsed.optimizer)
    shapes = [parameter.shape for group in groups if group["name"] == MATRICES for parameter in group["params"]]
    sizes = [(math.prod(shape[:-2]), *sorted(shape[-2:])) for shape in shapes]
    step = sum(count * (4 * rows**2 * columns + 2 * rows**3) for count, rows, columns in sizes)
    return parsed.optimizer.ns_steps * step / (parsed.batch_sequences * parsed.seq_len)


def recipe_path(name: str) -> Path:
    """Return the file of a recipe of the studies, or of one that LightLM ships."""
    own = Path(__file__).parent / "learning" / f"{name}.yaml"
    return own if own.is_file() else Path(__file__).parents[1] / "recipes" / f"{name}.yaml"


def last_tokens(entry: dict[str, Any]) -> float:
    return statistics.fmean(curve[-1][0] for curve in entry["runs"].values() if curve)
