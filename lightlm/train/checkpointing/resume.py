"""Resuming a run: its training state beside a checkpoint's weights, and its recipe, folder and newest checkpoint.

The training state lets a resumed run repeat an uninterrupted one exactly.
"""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from lightlm import checkpoint
from lightlm.data.folder import DataFolder
from lightlm.data.training_data import TrainingData
from lightlm.errors import CheckpointError, DataError, RecipeError
from lightlm.names import warn
from lightlm.recipe import Recipe, by_dotted_key, load_run_recipe, parse_recipe, span_tokens, with_new_names
from lightlm.recipe.sections.data import SOURCES
from lightlm.runs import RECIPE, find_run
from lightlm.train.observe.improvement import Best
from lightlm.train.observe.spikes import SpikeHistory
from lightlm.train.schedules import batch_plan, source_order
from lightlm.train.step.scaling import ScaleState

# Settings that fix a run's weights, batches or optimizer state: a resumed run cannot change them, nor any of `model`.
# What `data` names may change, because a run also remembers the content of its data; the order of the sequences that it
# has read may not (`_check_past`).
_FIXED = frozenset(
    {
        "train.batch_tokens",
        "train.seq_len",
        "train.seed",
        "train.init_from",
        "train.mtp.depth",
        "data.shift_windows",
        "data.too_long",
        "optimizer.name",
        "schedule.batch_warmup",
        "schedule.batch_start",
    }
)


@dataclass
class Progress:
    """Counts of a run so far; batches and learning rates are functions of them."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # the loader's whole state
    seconds: float = 0.0  # of training, without interruptions
    spikes: SpikeHistory = field(default_factory=SpikeHistory)  # empty in older checkpoints
    row: dict[str, Any] = field(default_factory=dict)  # the last step's metrics before its evaluation, likewise
    loss_scale: ScaleState = field(default_factory=ScaleState)  # likewise; see train/step/scaling.py
    best: Best = field(default_factory=Best)  # before the last step's validation, likewise
    averaged_from: int | None = None  # tokens at which the average of the weights began; None without `train.ema`


def data_identity(folder: DataFolder) -> str:
    """Return a hash of the checksums of tokenizer and shards; folders with the same one give the same batches."""
    manifest = folder.manifest
    shards = [*manifest.shards, *(manifest.chat.masks if manifest.chat else [])]
    parts = [manifest.tokenizer_sha256, *(f"{shard.file} {shard.xxh3}" for shard in shards)]
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())


def _identities(data: TrainingData) -> list[str]:
    return [data_identity(folder) for folder in data.folders.values()]


def pack(
    progress: Progress, optimizer: dict[str, Any], data: TrainingData, recipe: Recipe, teacher: str | None
) -> dict[str, Any]:
    """Return the training state of a checkpoint; `recipe` is what the run was trained with.

    `teacher` identifies the one of `train.distill`.
    """
    return {
        "progress": asdict(progress),
        "optimizer": optimizer,
        "rng": torch.get_rng_state(),
        "data": _identities(data),
        "recipe": recipe.to_dict(),
        "teacher": teacher,
    }


def unpack(folder: Path, data: TrainingData, recipe: Recipe, teacher: str | None) -> tuple[Progress, dict[str, Any]]:
    """Return a checkpoint's progress and optimizer state, and restore torch's random generator.

    Raises:
        CheckpointError: the checkpoint holds only weights, or its state cannot be read.
        RecipeError: the run had another teacher.
        DataError: `data` is not the run's data. It may have further folders at its end.
    """
    checkpoint.check(folder, [checkpoint.TRAINING_STATE])
    state = _read(folder)
    before: list[str] = [state["data"]] if isinstance(state["data"], str) else state["data"]  # earlier versions: one
    paths = [part.path for part in data.folders.values()]
    for path, old, new in zip(paths, before, _identities(data), strict=False):
        if old != new:
            raise DataError(
                f"{path} is not the data that {folder} was trained on: its tokenizer or shards differ; restore the old "
                "folder, name the folder that holds the same data with data.dataset=PATH, or start a new run"
                + (". The folders of a mixture must stay in their order" if len(before) > 1 else "")
            )
    if len(paths) < len(before):
        raise DataError(
            f"{folder} was trained on {len(before)} folders, and the recipe names {len(paths)}; name them all, in "
            "their order"
        )
    _check_teacher(folder, state.get("teacher"), teacher, recipe)
    torch.set_rng_state(state["rng"])
    progress = dict(state["progress"])
    spikes = SpikeHistory(**progress.pop("spikes", {}))
    scale = ScaleState(**progress.pop("loss_scale", {}))
    best = Best(**progress.pop("best", {}))
    return Progress(**progress, spikes=spikes, loss_scale=scale, best=best), state["optimizer"]


def _check_teacher(folder: Path, before: str | None, now: str | None, recipe: Recipe) -> None:
    """Refuse another teacher than that of the checkpoint. A run may lose its teacher, or get one, by an override."""
    if before is None or now is None or recipe.train.distill is None or before == now:
        return
    raise RecipeError(
        f"{recipe.train.distill.teacher} (train.distill.teacher) is not the teacher that {folder} was trained with: "
        "its weights, or the probabilities stored of it, differ. Restore it, name a model with the same weights with "
        "train.distill.teacher=MODEL, or start a new run"
    )


def check_resumable(folder: Path) -> None:
    """Verify that a checkpoint is undamaged and that its training state can be read.

    Raises:
        DamagedCheckpointError: it is damaged.
        CheckpointError: it holds only weights.
    """
    checkpoint.check(folder)
    _read(folder, mmap=True)  # mmap: leave out the tensors, whose checksum was just verified


def _read(folder: Path, *, mmap: bool = False) -> dict[str, Any]:
    path = folder / checkpoint.TRAINING_STATE
    if not path.is_file():
        raise CheckpointError(f"{folder} cannot be resumed: {path.name} is missing; it holds only weights")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise checkpoint.DamagedCheckpointError(f"{path} cannot be read: {error}") from None
    return state


def reopen_run(
    reference: str | Path | None, overrides: Sequence[str], warn: Callable[[str], None] = warn
) -> tuple[Recipe, Path, Path | None]:
    """Return a run's recipe, its folder and its newest undamaged checkpoint; without one the run restarts.

    This reads the whole checkpoint, so only one process of a run should call it. A process that will train holds the
    run's lock. A damaged checkpoint stays in place until the run trains (`saving.tidy`).

    Args:
        reference: path or name of the run; None is the newest.
        overrides: changes to the run's recipe.
        warn: receives a message for each damaged checkpoint, and one for changes of `recipe.yaml` since the checkpoint.

    Raises:
        CheckpointError: the run does not exist, or all its checkpoints are damaged.
        RecipeError: an override or `recipe.yaml` changes a setting that a resumed run cannot change.
    """
    run = find_run(reference)
    before, recipe = load_run_recipe(run), load_run_recipe(run, overrides, warn)
    saved = checkpoint.newest_checkpoint(run, check_resumable, warn) if checkpoint.checkpoints(run) else None
    since = run.name
    if saved is not None:
        since = saved.name
        if (recorded := _recorded_recipe(saved)) is None:
            warn(
                f"{saved} does not say which recipe it was trained with (an earlier version of LightLM saved it): "
                f"changes of {run / RECIPE} since then go unnoticed"
            )
        else:
            before = recorded
    _follow_changes(before, recipe, run, since, overrides, warn)
    if saved is not None:
        _check_past(before, recipe, run, _read(saved, mmap=True)["progress"]["samples"])
    return recipe, run, saved


def _recorded_recipe(folder: Path) -> Recipe | None:
    """Return the recipe in a checkpoint's training state; None if there is none that this version can read."""
    try:
        return parse_recipe(with_new_names(_read(folder, mmap=True)["recipe"]), str(folder), earlier=True)
    except (KeyError, RecipeError):
        return None


def _follow_changes(
    before: Recipe, now: Recipe, run: Path, since: str, overrides: Sequence[str], warn: Callable[[str], None]
) -> None:
    """Refuse changes of settings that a resumed run cannot change; name others that no override asked for."""
    old, new = _settings(before), _settings(now)
    if not now.model.vocab_size:  # it comes from the data, whose content is checked
        new["model.vocab_size"] = old.get("model.vocab_size")
    # `data.stages.0.until=1M` changes `data.stages`, which replaces `data.mix` and `data.dataset`.
    overridden = {".".join(override.partition("=")[0].strip().split(".")[:2]) for override in overrides}
    if overridden & (sources := {f"data.{key}" for key in SOURCES}):
        overridden |= sources
    changed = {
        key: f"{key} is {_written(new.get(key))} in {'an override' if _is_in(key, overridden) else run / RECIPE}, "
        f"{_written(old.get(key))} in {since}"
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key) != new.get(key)
    }
    if fixed := [key for key in changed if key in _FIXED or key.startswith("model.")]:
        raise RecipeError(
            f"{', '.join(fixed)} cannot change in a resumed run ({run}): {'; '.join(changed[key] for key in fixed)}. "
            "Undo that, or start a new run instead"
        )
    if edited := [text for key, text in changed.items() if not _is_in(key, overridden)]:
        warn(f"the recipe has changed and is followed: {'; '.join(edited)}")


def _check_past(before: Recipe, now: Recipe, run: Path, samples: int) -> None:
    """Refuse a recipe with another order of the `samples` sequences that the run has read.

    The future may change: a run may get a stage that it did not begin with.
    """
    if source_order(before).same_until(source_order(now), samples):
        return
    tokens = samples * before.seq_len
    advice = "begin changes of the mixture later"
    if before.data.parts == now.data.parts:  # train.tokens has moved the stages
        total = batch_plan(before).remaining()[1]
        ends = [f"{span_tokens(until, total)}" for until, _ in before.data.parts if until is not None]
        advice = f"a share of the run moves with train.tokens: write `until` in tokens ({', '.join(ends)})"
    raise RecipeError(
        f"{now.data.key} would give other sources to the {tokens:,} tokens that {run} has read; {advice}, "
        "or start a new run instead"
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values by dotted key, those of `train.mtp` too; settings without effect are left out."""
    settings = by_dotted_key(recipe.to_dict())
    mtp = settings.pop("train.mtp")
    return settings | by_dotted_key({"train.mtp": mtp})


def _is_in(key: str, overridden: set[str]) -> bool:
    """Return whether a key is one of those overridden, or belongs to one, as `train.mtp.weight` to `train.mtp`."""
    return ".".join(key.split(".")[:2]) in overridden


def _written(value: Any) -> str:
    """Return a value as a recipe writes it."""
    return json.dumps(value, ensure_ascii=False)
