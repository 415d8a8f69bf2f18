"""Everything that a report reads from a run folder: metrics, recipe, samples, scores."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lightlm.checkpoint import RAW_WEIGHTS
from lightlm.errors import CheckpointError, LightLMError, UsageError
from lightlm.evaluate.compare.comparison import answers_of
from lightlm.evaluate.compare.table import Score
from lightlm.evaluate.results import documents
from lightlm.machine import read_machine
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_run_recipe
from lightlm.report.curves import Curves, newest, smooth
from lightlm.runs import RECIPE
from lightlm.runs.metrics import read_metrics
from lightlm.train.schedules import batch_plan

_NAMED_RESUMES = 5  # in a note


@dataclass(frozen=True)
class Record:
    """A run, read from its folder.

    Args:
        name: the run's name in the report.
        recipe: the recipe's sections as plain values, with every default written out.
        parameters: `Transformer.num_parameters`, `flops_per_token` and `planned_tokens`; empty if this version cannot
            read the recipe.
        samples: (step, text) of every validation.
        machine: contents of `machine.json`; empty without it.
        notes: facts that a reader should know before trusting the curves.
    """

    name: str
    path: Path
    curves: Curves
    recipe: dict[str, Any]
    parameters: dict[str, int]
    samples: list[tuple[int, str]]
    scores: list[Score]
    machine: dict[str, Any]
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """Return the run as one row; None for unknown values. Times cover only training steps."""
        curves = self.curves
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
            "loss": newest(smooth(curves.column("loss"))),
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
    """Read every run. Its name is its folder's, or its path if two folders have the same name.

    Raises:
        UsageError: a run is named twice.
        CheckpointError: a run has no metrics yet, or they cannot be read.
    """
    resolved = [run.resolve() for run in runs]
    if twice := [run for run, place in zip(runs, resolved, strict=True) if resolved.count(place) > 1]:
        raise UsageError(f"{twice[0]} is named twice; name each run once")
    names = [place.name for place in resolved]
    names = [name if names.count(name) == 1 else run.as_posix() for run, name in zip(runs, names, strict=True)]
    return [_read_record(run, name) for run, name in zip(runs, names, strict=True)]


def _read_record(run: Path, name: str) -> Record:
    try:
        curves = Curves(read_metrics(run))
    except ValueError as error:
        raise CheckpointError(f"{run / 'metrics.jsonl'} is damaged: a line is not a JSON object ({error})") from None
    if not len(curves):
        raise CheckpointError(
            f"{run} has nothing to plot: its metrics.jsonl holds no steps yet; train it for a step, or name another run"
        )
    notes: list[str] = []
    recipe, parameters = _read_recipe(run, notes)
    scores = list(_read_scores(run, name, notes))
    notes += _note_curves(curves, parameters)
    return Record(name, run, curves, recipe, parameters, _read_samples(run), scores, read_machine(run), notes)


def _read_recipe(run: Path, notes: list[str]) -> tuple[dict[str, Any], dict[str, int]]:
    path = run / RECIPE
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe = load_run_recipe(run)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        notes.append(f"{path} cannot be read: {error}")
        return {}, {}
    except LightLMError as error:
        notes.append(f"This version of LightLM cannot read the recipe, so it cannot count parameters: {error}")
        return values if isinstance(values, dict) else {}, {}
    with torch.device("meta"):
        model = Transformer(recipe.model, recipe.train.mtp.depth)
    counts = model.num_parameters() | {"flops_per_token": model.flops_per_token(recipe.seq_len)}
    return recipe.to_dict(), counts | {"planned_tokens": batch_plan(recipe).remaining()[1]}


def _read_samples(run: Path) -> list[tuple[int, str]]:
    found = [(re.fullmatch(r"step_(\d+)", path.stem), path) for path in (run / "samples").glob("step_*.txt")]
    return sorted((int(n[1]), path.read_text(encoding="utf-8", errors="replace").strip()) for n, path in found if n)


def _read_scores(run: Path, name: str, notes: list[str]) -> Iterator[Score]:
    """Yield the scores in `eval/*.json`; note a file that does not hold lm-eval's results."""
    for path in sorted((run / "eval").glob("*.json")):
        if path.name.endswith(".meta.json"):
            continue
        step = re.match(r"step_(\d+)_", path.name)
        meta = path.with_suffix(".meta.json")  # missing if another tool wrote the results
        scored: list[documents.Document] = []
        with contextlib.suppress(ValueError):  # without them, scores are shown but not compared
            scored = documents.read(documents.documents_file(path))
        try:
            facts = json.loads(meta.read_text(encoding="utf-8")) if meta.exists() else {}
            if RAW_WEIGHTS in facts.get("weights", {}):  # of the last weights, beside the average that is the model
                continue
            results = json.loads(path.read_text(encoding="utf-8"))
            answers = answers_of(name, results, scored, facts)
            limit = results.get("config", {}).get("limit")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{path} does not hold lm-eval's results and is left out.")
            continue
        yield from (Score(int(step[1]) if step else None, limit, answer) for answer in answers)


def _note_curves(curves: Curves, parameters: dict[str, int]) -> Iterator[str]:
    planned, tokens = parameters.get("planned_tokens"), int(curves.tokens[-1])
    if curves.flagged("stopped_early")[-1]:
        yield f"Ended by train.patience at {tokens:,} tokens."
    elif planned and tokens < planned:
        yield f"Not at its end: {tokens:,} of {planned:,} tokens ({tokens / planned:.0%})."
    if len(resumed := curves.steps[curves.flagged("resumed")]):
        after = ", ".join(f"{int(step) - 1:,}" for step in resumed[:_NAMED_RESUMES])
        more = f" and {len(resumed) - _NAMED_RESUMES:,} more" if len(resumed) > _NAMED_RESUMES else ""
        yield f"Resumed after {'step' if len(resumed) == 1 else 'steps'} {after}{more}."
    if lost := curves.lost("loss"):
        yield f"The loss was NaN or infinite in {lost:,} {'step' if lost == 1 else 'steps'}."
    if spikes := int(curves.flagged("spike").sum()):
        skipped = int(curves.flagged("skipped").sum())
        yield f"{spikes:,} loss {'spike' if spikes == 1 else 'spikes'}{f', {skipped:,} skipped' if skipped else ''}."
    if curves.last("val_loss") is None:
        yield "No validation loss was measured."
