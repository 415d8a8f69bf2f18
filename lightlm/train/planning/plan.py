"""The plan of a run: sizes, operations, memory by part, and hours."""

import sys
from typing import Any

import torch

from lightlm.data.folder import DataFolder
from lightlm.data.loader import epoch_tokens
from lightlm.data.training_data import TrainingData, folder_paths
from lightlm.device import ACCELERATORS, Accelerator, describe, pick_device, pick_dtype, training_dtype
from lightlm.errors import UsageError
from lightlm.limits import memory
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe
from lightlm.train.fitting import fit_recipe
from lightlm.train.initial import Note
from lightlm.train.planning.memory import inference_parts, training_parts
from lightlm.train.planning.probe import Probe, ProbeError, process_memory, run_probe
from lightlm.train.planning.roofline import BANDWIDTH_SHARE, COMPUTE_SHARE, step_seconds
from lightlm.train.planning.teacher import forward_flops, teacher_bytes, teacher_facts, teacher_of
from lightlm.train.schedules import (
    batch_plan,
    corner_points,
    describe_other_schedules,
    describe_schedule,
    momentum_points,
    source_order,
    weight_decay_points,
)
from lightlm.train.setup import open_data
from lightlm.train.step.gradients import micro_batch_size

_USABLE = 0.9  # share of a GPU's memory; the rest is left to CUDA's context and to gaps between blocks
# Share of free memory between blocks in use on a CPU, which the system counts. Probes of five shapes and precisions
# with torch 2.13 held 6 to 23% more than the sum of their parts.
_GAPS = 0.1


def make_plan(recipe: Recipe, *, probe: bool = True) -> dict[str, Any]:
    """Return the plan as one document of plain values, sizes in bytes. The data need not be prepared.

    Args:
        probe: run a few steps on the recipe's device, if this machine has it.

    Raises:
        DataError: the data is prepared, and the recipe does not fit it.
        UsageError: torch does not know the device.
    """
    notes: list[str] = []
    note = notes.append
    data = open_data(recipe, required=False)
    recipe = fit_recipe(recipe, data, note)
    with torch.device("meta"):
        model = Transformer(recipe.model, recipe.train.mtp.depth)
    teacher = teacher_of(recipe)
    counts, flops = model.num_parameters(), model.flops_per_token(recipe.seq_len)
    if recipe.eval.tasks:
        note(f"the hours leave out eval.tasks ({', '.join(recipe.eval.tasks)})")
    run = run_sizes(recipe, data)
    run |= {
        "schedule": describe_schedule(recipe),
        "learning_rates": corner_points(recipe),
        "other_schedules": describe_other_schedules(recipe),
        "weight_decays": weight_decay_points(recipe),
        "momenta": momentum_points(recipe),
        "flops": flops * run["tokens"],
        "sources": _sources(recipe, run["tokens"]),
        "teacher": teacher_facts(recipe, teacher, data, run["tokens"]),
    }
    return {
        "recipe": recipe.name,
        "model": {
            "parameters": counts["total"],
            "active_parameters": counts["active"],
            "embedding_parameters": counts["embedding"],
            "mtp_parameters": model.mtp_parameters,
            "vocab_size": recipe.model.vocab_size,
            "flops_per_token": flops,
        },
        "run": run,
        "machine": _machine(recipe, model, teacher, run, probe, note),
        "inference": inference_parts(model),
        "gpus": [_gpu(name, gpu, recipe, model, teacher, run) for name, gpu in ACCELERATORS.items()],
        "assumed": {"compute": COMPUTE_SHARE, "bandwidth": BANDWIDTH_SHARE},
        "notes": notes,
    }


def run_sizes(recipe: Recipe, data: TrainingData | None) -> dict[str, Any]:
    """Return the tokens, steps and validations of a new run."""
    validation_tokens = recipe.eval.tokens
    if data:
        streams = [stream for stream in data.streams("val").values() if len(stream)]
        validation_tokens = sum(min(recipe.eval.tokens // len(streams), len(stream)) for stream in streams)
    steps, tokens = batch_plan(recipe).remaining()
    batch_tokens = recipe.batch_sequences * recipe.seq_len
    # Validations come at each step that reaches a multiple of eval.every, and at the last step. With train.ema, each is
    # one of the average and one of the last weights.
    validations = min((tokens - batch_tokens) // recipe.eval.every + 1, steps) if recipe.eval.every else 1
    validations += recipe.train.init_from is not None  # of the model, before the first step
    return {
        "tokens": tokens,
        "steps": steps,
        "batch_tokens": batch_tokens,
        "validations": validations if validation_tokens else 0,
        "validation_tokens": validations * validation_tokens * (1 + recipe.train.averages),
    }


def _sources(recipe: Recipe, tokens: int) -> list[dict[str, Any]]:
    """Return what a run reads of each folder; size and epochs of one that is not prepared are None."""
    counts = source_order(recipe).counts(tokens // recipe.seq_len).tolist()
    rows = []
    for (name, path), count in zip(folder_paths(recipe.data.sources).items(), counts, strict=True):
        size, read = None, count * recipe.seq_len
        if path.is_dir():
            size = epoch_tokens(DataFolder.open(path).split("train"), recipe.seq_len, recipe.data.too_long)
        rows.append({"name": name, "tokens": read, "train_tokens": size, "epochs": read / size if size else None})
    return rows


def run_seconds(probe: Probe, recipe: Recipe, run: dict[str, Any]) -> float:
    """Return the time of a whole run of these sizes at a probe's speed, without samples, checkpoints and tasks."""
    training = probe.training_seconds(recipe, run["tokens"], run["steps"])
    return training + probe.validation_seconds(recipe, run["validation_tokens"])


def _target(recipe: Recipe, note: Note) -> tuple[torch.device, torch.dtype, bool]:
    """Return the recipe's device and precision, and whether this machine has the device."""
    name, width = recipe.train.device, recipe.model.hidden_size
    try:
        device = pick_device(name)
    except UsageError as error:
        if name.partition(":")[0] not in ("cuda", "mps"):
            raise
        note(f"not probed: {error}")
        device = torch.device(name)
        fast = device.type == "cuda" and recipe.train.dtype == "auto"
        return device, torch.bfloat16 if fast else pick_dtype(recipe.train.dtype, device, width), False
    return device, training_dtype(recipe.train.dtype, device, width, lambda slow: note(f"train.dtype={slow}")), True


def _parts(
    recipe: Recipe,
    model: Transformer,
    teacher: Transformer | None,
    device: torch.device,
    dtype: torch.dtype,
    sequences: int,
) -> dict[str, int]:
    """Return the bytes of training by part, those of a teacher included; see `training_parts`."""
    tokens = sequences * recipe.seq_len
    return training_parts(recipe, model, device, dtype, sequences) | teacher_bytes(
        recipe, teacher, device, dtype, tokens
    )


def _machine(
    recipe: Recipe, model: Transformer, teacher: Transformer | None, run: dict[str, Any], probe: bool, note: Note
) -> dict[str, Any]:
    """Return memory by part on the recipe's device, and the probe's measurements of a full batch."""
    device, dtype, present = _target(recipe, note)
    measured = None
    if not probe:
        note("not probed: memory is an estimate, and there are no hours for this machine")
    elif present:
        try:
            measured = run_probe(recipe)
        except ProbeError as error:
            note(f"{error}; memory is an estimate, and there are no hours for this machine")
    # The memory of a missing device is unknown, so any micro-batch fits.
    free = None if present else sys.maxsize
    sequences = measured.micro_batch if measured else micro_batch_size(recipe, device, free=free, dtype=dtype)
    parts = _parts(recipe, model, teacher, device, dtype, sequences)
    # The host's copy that a run saves from. The last save of a run makes none.
    settings = recipe.checkpoint
    spans = (settings.every, settings.keep_every, recipe.eval.every if settings.keep_best else 0)
    saves = any(0 < every < run["tokens"] for every in spans)
    if settings.every_minutes:  # without a measurement, the run is taken to be longer
        saves |= measured is None or run_seconds(measured, recipe, run) > 60 * settings.every_minutes
    copy = parts["weights"] + parts["optimizer"] + parts.get("ema", 0) if saves and settings.asynchronous else 0
    if device.type == "cpu":
        # With a GPU, the copy and the process take memory of the host instead.
        base = measured.process_memory if measured else process_memory()
        parts |= {"gaps": round(_GAPS * sum(parts.values())), "checkpoint_copy": copy, "process": base or 0}
        if (needed := sum(parts.values())) > memory():
            note(
                f"training takes about {needed / 1e9:.1f} GB of memory, and this process may use {memory() / 1e9:.1f}: "
                "the system would end it; choose a smaller model, train.seq_len or train.micro_batch_size"
            )
    return {
        "device": describe(device) if present else f"{device} (not available)",
        "dtype": str(dtype).removeprefix("torch."),
        "micro_batch": sequences,
        "accumulation": -(-recipe.batch_sequences // sequences),
        "memory": parts | {"total": sum(parts.values())},
        "host_checkpoint_copy": copy,
        "measured": measured and _measurements(measured, recipe, run, parts.get("checkpoint_copy", 0)),
    }


def _measurements(probe: Probe, recipe: Recipe, run: dict[str, Any], copy: int) -> dict[str, Any]:
    """Return the measurements of a full batch. A probe saves nothing, so `copy` is added to its memory."""
    step_seconds = recipe.batch_sequences / probe.micro_batch * probe.pass_seconds + probe.update_seconds
    return {
        "pass_seconds": probe.pass_seconds,
        "update_seconds": probe.update_seconds,
        "forward_seconds": probe.forward_seconds,
        "step_seconds": step_seconds,
        "tokens_per_second": recipe.batch_sequences * recipe.seq_len / step_seconds,
        "memory": None if probe.memory is None else probe.memory + copy,
        "hours": run_seconds(probe, recipe, run) / 3600,
    }


def _gpu(
    name: str, gpu: Accelerator, recipe: Recipe, model: Transformer, teacher: Transformer | None, run: dict[str, Any]
) -> dict[str, Any]:
    """Estimate one GPU of this kind, with the given micro-batch or the largest automatic one that fits."""
    device = torch.device("cuda")
    weights = 4 * (model.num_parameters()["total"] + model.mtp_parameters)
    dtype = torch.float32 if recipe.train.dtype == "float32" else torch.bfloat16
    sequences = micro_batch_size(recipe, device, free=max(int(gpu.memory) - weights, 0), dtype=dtype)
    memory = sum(_parts(recipe, model, teacher, device, dtype, sequences).values())
    while memory > _USABLE * gpu.memory and recipe.train.micro_batch_size == "auto" and sequences > 1:
        sequences = max(size for size in range(1, sequences // 2 + 1) if sequences % size == 0)
        memory = sum(_parts(recipe, model, teacher, device, dtype, sequences).values())
    # The peak is that of bf16, so there is no estimate of hours for fp32. A forward pass has a third of the operations.
    seconds = step_seconds(gpu, recipe, model, sequences)
    if teacher is not None:
        seconds += run["batch_tokens"] * forward_flops(teacher, recipe.seq_len) / (COMPUTE_SHARE * gpu.peak)
    speed = run["batch_tokens"] / seconds
    hours = (run["tokens"] + run["validation_tokens"] / 3) / speed / 3600
    return {
        "gpu": name,
        "device_memory": int(gpu.memory),
        "micro_batch": sequences,
        "memory": memory,
        "fits": memory <= _USABLE * gpu.memory,
        "hours": hours if dtype == torch.bfloat16 else None,
        "utilization": speed * model.flops_per_token(recipe.seq_len) / gpu.peak if dtype == torch.bfloat16 else None,
    }
