"""What a run folder says about its run: metrics, recipe, samples, scores."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from lightlm.errors import CheckpointError, LightLMError, UsageError
from lightlm.evaluate.compare.comparison import Protocol, answers_of
from lightlm.evaluate.results.rows import Row
from lightlm.machine import read_machine
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_run_recipe
from lightlm.report.charts.curves import Curves, newest, smooth, smoothing_window
from lightlm.train.observe.metrics import read_metrics
from lightlm.train.schedules import batch_plan


@dataclass(frozen=True)
class Score:
    """One figure of lm-eval on a checkpoint.

    Args:
        step: the checkpoint's; None if the file's name does not say.
        limit: the number of documents the task was cut to, None for all.
        file: of the results.
    """

    step: int | None
    row: Row
    limit: int | None
    protocol: Protocol
    file: Path


@dataclass(frozen=True)
class Record:
    """A run, read from its folder.

    Args:
        name: how the report calls it.
        recipe: the recipe's sections as plain values, every default written out.
        parameters: `Transformer.num_parameters`, `flops_per_token` and `planned_tokens`, empty if this version cannot
            read the recipe.
        samples: (step, text) of every validation.
        machine: see `lightlm.machine`; empty for runs without it.
        notes: what a reader should know before trusting the curves.
    """

    name: str
    path: Path
    curves: Curves
    recipe: dict[str, Any]
    parameters: dict[str, int]
    samples: list[tuple[int, str]]
    scores: list[Score]
    machine: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The run in one row; None for what is not known. Seconds are of training alone."""
        curves = self.curves
        smoothed = smooth(curves.column("loss"), smoothing_window(len(curves)))
        tokens, seconds = int(curves.tokens[-1]), newest(curves.seconds)
        device, processes = self.machine.get("device"), self.machine.get("processes", 1)
        return {
            "name": self.name,
            "path": str(self.path),
            "parameters": self.parameters.get("total"),
            "active_parameters": self.parameters.get("active"),
            "flops_per_token": self.parameters.get("flops_per_token"),
            "step": int(curves.steps[-1]),
            "tokens": tokens,
            "planned_tokens": self.parameters.get("planned_tokens"),
            "loss": newest(smoothed),
            "val_loss": curves.last("val_loss"),
            "val_bpb": curves.last("val_bpb"),
            "tokens_per_second": tokens / seconds if seconds else None,
            "mfu": curves.last("mfu"),
            "hours": seconds / 3600 if seconds is not None else None,
            "spikes": int(curves.flagged("spike").sum()),
            "device": f"{processes} x {device}" if device and processes > 1 else device,
            "data": (self.recipe.get("data") or {}).get("dataset"),
        }


def read_records(runs: list[Path]) -> list[Record]:
    """Every run's record, each under a name of its own: the folder's, or its path where two have the same.

    Raises:
        UsageError: a run is named twice.
        CheckpointError: a run has no metrics yet, or they cannot be read.
    """
    resolved = [run.resolve() for run in runs]
    if twice := [str(run) for run, place in zip(runs, resolved, strict=True) if resolved.count(place) > 1]:
        raise UsageError(f"{twice[0]} is named twice; name each run once")
    names = [run.name for run in resolved]
    return [
        read_record(run, name if names.count(name) == 1 else run.as_posix())
        for run, name in zip(runs, names, strict=True)
    ]


def read_record(run: Path, name: str) -> Record:
    """One run's record; see `read_records`."""
    try:
        curves = Curves(read_metrics(run))
    except ValueError as error:
        raise CheckpointError(f"{run / 'metrics.jsonl'} is damaged: a line is no JSON object ({error})") from None
    if not len(curves):
        raise CheckpointError(
            f"{run} has nothing to plot: its metrics.jsonl holds no steps yet; let it train for a step, "
            "or name another run"
        )
    notes: list[str] = []
    recipe, parameters = _read_recipe(run, notes)
    scores = list(_read_scores(run, notes))
    _note_curves(curves, parameters, notes)
    return Record(name, run, curves, recipe, parameters, _read_samples(run), scores, read_machine(run), notes)


def _read_recipe(run: Path, notes: list[str]) -> tuple[dict[str, Any], dict[str, int]]:
    path = run / "recipe.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe = load_run_recipe(run)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        notes.append(f"{path} cannot be read: {error}")
        return {}, {}
    except LightLMError as error:
        notes.append(f"This version of LightLM cannot read the recipe, so its parameters are not counted: {error}")
        return values if isinstance(values, dict) else {}, {}
    with torch.device("meta"):
        model = Transformer(recipe.model)
    counts = model.num_parameters() | {"flops_per_token": model.flops_per_token(recipe.seq_len)}
    return recipe.to_dict(), counts | {"planned_tokens": batch_plan(recipe).remaining()[1]}


def _read_samples(run: Path) -> list[tuple[int, str]]:
    found = []
    for path in sorted((run / "samples").glob("step_*.txt")):
        step = path.stem.removeprefix("step_")
        if step.isdecimal():
            found.append((int(step), path.read_text(encoding="utf-8", errors="replace").strip()))
    return sorted(found)


def _read_scores(run: Path, notes: list[str]) -> Iterator[Score]:
    """The figures of `eval/*.json`; a file that does not hold lm-eval's results becomes a note."""
    for path in sorted((run / "eval").glob("*.json")):
        if path.name.endswith(".meta.json"):
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found = [(answers.row, answers.protocol) for answers in answers_of("", document, [], _facts(path))]
            limit = document.get("config", {}).get("limit")
        except (ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{path} does not hold lm-eval's results and is left out.")
            continue
        step = re.match(r"step_(\d+)_", path.name)
        yield from (Score(int(step[1]) if step else None, row, limit, protocol, path) for row, protocol in found)


def _facts(results: Path) -> dict[str, Any]:
    """What `lightlm eval` wrote beside results, if it was that which wrote them."""
    try:
        facts = json.loads(results.with_suffix(".meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _note_curves(curves: Curves, parameters: dict[str, int], notes: list[str]) -> None:
    planned, tokens = parameters.get("planned_tokens"), int(curves.tokens[-1])
    if planned and tokens < planned:
        notes.append(f"Not at its end: {tokens:,} of {planned:,} tokens ({tokens / planned:.0%}).")
    if lost := curves.lost("loss"):
        notes.append(f"The loss was not a number in {lost:,} {'step' if lost == 1 else 'steps'}.")
    if spikes := int(curves.flagged("spike").sum()):
        skipped = int(curves.flagged("skipped").sum())
        notes.append(
            f"{spikes:,} loss {'spike' if spikes == 1 else 'spikes'}" + (f", {skipped:,} skipped." if skipped else ".")
        )
    if curves.last("val_loss") is None:
        notes.append("No validation loss was measured.")
