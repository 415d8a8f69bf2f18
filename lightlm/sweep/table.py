"""The results of a sweep: mean and spread over seeds, and each contestant against the baseline, paired by seed.

The difference of two contestants is the mean of their differences on the same seeds: a seed fixes the initial weights
and the order of the data, so that much of its effect cancels. Its interval and p-value are those of the paired t-test;
the p-values of all comparisons are adjusted together (Holm 1979). Shapes: S seeds.
"""

import contextlib
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightlm.errors import LightLMError, UsageError
from lightlm.recipe import load_run_recipe
from lightlm.report.curves import Curves, Floats
from lightlm.runs.metrics import read_metrics
from lightlm.sweep.cells import Contestant
from lightlm.sweep.folder import Definition, State, SweepFolder

SIGNIFICANCE = 0.05
Verdict = Literal["baseline", "better", "worse", "noise", "one seed", "diverged", "missing"]
# Of scores (eval/TASK/METRIC) more is better, apart from these; of other metrics less is better, apart from those.
_LOSSES = ("perplexity", "bits_per_byte", "brier_score", "loss", "nll", "/ter")  # ends of their names
_SPEEDS = ("tokens_per_second", "mfu")


@dataclass(frozen=True)
class Paired:
    """A contestant minus the baseline on the seeds that both have.

    Attributes:
        low, high: the 95% interval, not adjusted for the number of comparisons; None for one seed.
        p_value: two-sided, adjusted; None for one seed.
    """

    value: float
    seeds: int
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    @property
    def margin(self) -> float | None:
        """Half of the 95% interval; None for one seed."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Line:
    """A contestant's row.

    Attributes:
        finals: the metric's last value by seed, of the runs that are done.
        states: of all its runs, by seed.
        tokens, seconds: means of the runs that are done; seconds are those of training steps.
    """

    contestant: Contestant
    finals: dict[int, float]
    states: dict[int, State]
    tokens: float | None
    seconds: float | None
    paired: Paired | None
    verdict: Verdict

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.finals.values()) if self.finals else None

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.finals.values()) if len(self.finals) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        values = dict(self.contestant.values)
        return {
            "name": self.contestant.name,
            "recipe": self.contestant.recipe,
            "changes": list(self.contestant.changes),
            "values": values,
            "finals": self.finals,
            "states": self.states,
            "mean": self.mean,
            "std": self.std,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "difference": None if self.paired is None else vars(self.paired),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Results:
    """What a sweep has found so far.

    Attributes:
        curves: the metrics of each run that is done, by contestant and seed.
        flops: of training on one token, by contestant, if models differ; else empty.
        notes: what a reader should know before trusting the table.
    """

    folder: Path
    metric: str
    baseline: str
    lines: list[Line]
    curves: dict[str, dict[int, Curves]]
    flops: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def more_is_better(self) -> bool:
        return more_is_better(self.metric)

    def best_first(self) -> list[Line]:
        """Return the lines by their mean, those without one last."""
        sign = -1.0 if self.more_is_better else 1.0
        return sorted(self.lines, key=lambda line: math.inf if line.mean is None else sign * line.mean)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sweep": self.folder.name,
            "folder": str(self.folder),
            "metric": self.metric,
            "more_is_better": self.more_is_better,
            "baseline": self.baseline,
            "contestants": [line.to_dict() for line in self.lines],
            "notes": self.notes,
        }


def more_is_better(metric: str) -> bool:
    """Return whether more of a metric is better: of scores and speeds, but not of losses."""
    if not metric.startswith("eval/"):
        return metric in _SPEEDS
    return not metric.endswith(_LOSSES)


def read_results(
    folder: SweepFolder, definition: Definition, metric: str, baseline: str | None = None, notes: Sequence[str] = ()
) -> Results:
    """Read the runs of a sweep and compare each contestant with the baseline: the first unless it is named.

    Args:
        baseline: a contestant's name, or its only value.

    Raises:
        UsageError: no contestant has this name, or no run has this metric.
    """
    entries = definition.entries
    first = find_baseline(baseline, [entry.contestant for entry in entries.values()])
    states = {name: {cell.seed: folder.status(cell).state for cell in entry.cells()} for name, entry in entries.items()}
    curves = {
        name: {
            cell.seed: Curves(read_metrics(folder.run(cell)))
            for cell in entry.cells()
            if states[name][cell.seed] == "done"
        }
        for name, entry in entries.items()
    }
    finals = {
        name: {seed: value for seed, run in runs.items() if (value := run.last(metric)) is not None}
        for name, runs in curves.items()
    }
    done = [run for runs in curves.values() for run in runs.values()]
    if done and not any(finals.values()):
        known = dict.fromkeys(itertools.chain.from_iterable(run.keys() for run in done))
        raise UsageError(f"--metric {metric}: no run has this metric; they have {', '.join(known)}")
    pairs = _compare(finals, first, more_is_better(metric))
    lines = []
    for name, entry in entries.items():
        paired = pairs.get(name)
        verdict = _verdict(name == first, list(states[name].values()), finals[name], paired, more_is_better(metric))
        tokens, seconds = (_mean([run.last(key) for run in curves[name].values()]) for key in ("tokens", "seconds"))
        lines.append(Line(entry.contestant, finals[name], states[name], tokens, seconds, paired, verdict))
    return Results(folder.path, metric, first, lines, curves, _flops(folder, definition), list(notes))


def _flops(folder: SweepFolder, definition: Definition) -> dict[str, float]:
    """Return the operations of training on one token, by contestant; nothing if all models are of one shape."""
    shapes = [
        (entry.settings.get("model"), entry.settings["train"].get("seq_len")) for entry in definition.entries.values()
    ]
    if all(shape == shapes[0] for shape in shapes):
        return {}
    import torch

    from lightlm.model.transformer import Transformer

    found = {}
    for name, entry in definition.entries.items():
        for cell in entry.cells():
            if folder.status(cell).state == "done":
                with contextlib.suppress(LightLMError), torch.device("meta"):  # the recipe of another version
                    recipe = load_run_recipe(folder.run(cell), (), lambda note: None)
                    model = Transformer(recipe.model, recipe.train.mtp.depth)
                    found[name] = float(model.flops_per_token(recipe.seq_len))
                break
    return found


def find_baseline(baseline: str | None, contestants: Sequence[Contestant]) -> str:
    """Return the contestant of this name, or with this as its only value; the first for None.

    Raises:
        UsageError: there is none.
    """
    if baseline is None:
        return contestants[0].name
    for entry in contestants:
        if baseline == entry.name or [baseline] == list(entry.values.values()):
            return entry.name
    names = ", ".join(entry.name for entry in contestants)
    raise UsageError(f"--baseline {baseline}: no such contestant; there are {names}")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _compare(finals: Mapping[str, Mapping[int, float]], first: str, more: bool) -> dict[str, Paired]:
    """Return each contestant minus the baseline, for those that share at least one seed with it."""
    from lightlm.evaluate.compare.paired import holm

    shared = {
        name: np.array([values[seed] - finals[first][seed] for seed in values if seed in finals[first]])
        for name, values in finals.items()
        if name != first
    }
    tested = {name: _paired_t(differences_S) for name, differences_S in shared.items() if len(differences_S)}
    p_values = {name: paired.p_value for name, paired in tested.items() if paired.p_value is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return {name: replace(paired, p_value=adjusted.get(name)) for name, paired in tested.items()}


def _paired_t(differences_S: Floats) -> Paired:
    """Return the mean of differences, with the interval and p-value of the t-test if there are several."""
    value, count = float(differences_S.mean()), len(differences_S)
    if count < 2:
        return Paired(value, count)
    if not differences_S.std():  # the t-test divides by it
        return Paired(value, count, value, value, 0.0 if value else 1.0)
    from scipy import stats

    found = stats.ttest_1samp(differences_S, 0.0)
    low, high = found.confidence_interval(1 - SIGNIFICANCE)
    return Paired(value, count, float(low), float(high), float(found.pvalue))


def _verdict(
    is_baseline: bool, states: Sequence[State], finals: Mapping[int, float], paired: Paired | None, more: bool
) -> Verdict:
    if "diverged" in states:
        return "diverged"
    if is_baseline:
        return "baseline"
    if not finals or paired is None:
        return "missing"
    if paired.p_value is None:
        return "one seed"
    if paired.p_value >= SIGNIFICANCE:
        return "noise"
    return "better" if (paired.value > 0) == more else "worse"
