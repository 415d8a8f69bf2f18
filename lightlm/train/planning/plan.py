"""What a recipe will take, before it is run: sizes, operations, memory by part, and hours."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightlm.data.shards import DataFolder, resolve_dataset
from lightlm.device import ACCELERATORS, Accelerator, describe, pick_device, pick_dtype
from lightlm.errors import UsageError
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe
from lightlm.train.batches import batch_plan
from lightlm.train.observe.observers import Silent
from lightlm.train.planning.memory import inference_parts, optimizer_bytes, training_parts
from lightlm.train.planning.probe import Probe, ProbeError, process_memory, run_probe
from lightlm.train.setup import fit_recipe
from lightlm.train.step.compilation import compiles
from lightlm.train.step.gradients import micro_batch_size

ASSUMED_VOCABULARY = 50_257  # GPT-2's, where neither the recipe nor prepared data say
ASSUMED_UTILISATION = 0.4  # of a GPU's bf16 peak; LightLM has measured none
_USABLE = 0.9  # of a GPU's memory; the rest is left to CUDA's context and to gaps between blocks
# Of what a run allocates on a CPU: memory that lies free between blocks in use, which the system counts. Probes of
# five shapes and precisions with torch 2.13 held 6 to 23% more than the sum of their parts.
_GAPS = 0.1
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What a run does, whatever the machine."""

    steps: int
    tokens: int
    validations: int
    validation_tokens: int  # in all of them

    def hours(self, probe: Probe, seq_len: int) -> float:
        """At a probe's speed. A pass's time is taken to be in proportion to its tokens."""
        a_pass = probe.micro_batch * seq_len
        training = self.tokens / a_pass * probe.pass_seconds + self.steps * probe.update_seconds
        return (training + self.validation_tokens / a_pass * probe.forward_seconds) / 3600

    def hours_at(self, tokens_per_second: float) -> float:
        """At a training speed; a forward pass has a third of its operations."""
        return (self.tokens + self.validation_tokens / 3) / tokens_per_second / 3600


@dataclass(frozen=True)
class Target:
    """The device that a recipe names, which may not be here."""

    device: torch.device
    dtype: torch.dtype
    present: bool


class Notes(Silent):
    """What a plan says beside its figures."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def note(self, message: str) -> None:
        self.messages.append(message)


def make_plan(recipe: Recipe, *, probe: bool = True) -> dict[str, Any]:
    """The plan as one document of plain values, sizes in bytes. docs/design.md says what is assumed.

    Args:
        probe: run a few steps on the recipe's device, if this machine has it.

    Raises:
        DataError: the data is prepared, and the recipe does not fit it.
        UsageError: torch knows no such device.
    """
    observer = Notes()
    recipe, validation_tokens = _with_data(recipe, observer)
    target = _target(recipe, observer)
    measured = None
    if not probe:
        observer.note("not probed: memory is an estimate, and there are no hours for this machine")
    elif target.present:
        measured = _measured(recipe, observer)
    with torch.device("meta"):
        model = Transformer(recipe.model)
    work = _work(recipe, validation_tokens)
    counts, flops = model.num_parameters(), model.flops_per_token(recipe.seq_len)
    if recipe.eval.tasks:
        observer.note(f"the hours leave out eval.tasks ({', '.join(recipe.eval.tasks)})")
    return {
        "recipe": recipe.name,
        "model": {
            "parameters": counts["total"],
            "active_parameters": counts["active"],
            "embedding_parameters": counts["embedding"],
            "vocab_size": recipe.model.vocab_size,
            "flops_per_token": flops,
        },
        "run": {
            "tokens": work.tokens,
            "steps": work.steps,
            "batch_tokens": recipe.batch_sequences * recipe.seq_len,
            "flops": flops * work.tokens,
            "validations": work.validations,
            "validation_tokens": work.validation_tokens,
        },
        "machine": _machine(recipe, model, work, target, measured),
        "inference": inference_parts(model),
        "gpus": [_gpu(name, gpu, recipe, model, work) for name, gpu in ACCELERATORS.items()],
        "assumed_utilisation": ASSUMED_UTILISATION,
        "notes": observer.messages,
    }


def _with_data(recipe: Recipe, observer: Notes) -> tuple[Recipe, int]:
    """The recipe with a vocabulary, and the tokens of one validation."""
    folder = resolve_dataset(recipe.data.dataset)
    if folder.is_dir():
        data = DataFolder.open(folder)
        return fit_recipe(recipe, data, observer), min(recipe.eval.tokens, len(data.split("val")))
    assumed = ""
    if not recipe.model.vocab_size:
        recipe = recipe.model_copy(update={"model": replace(recipe.model, vocab_size=ASSUMED_VOCABULARY)})
        assumed = f" a vocabulary of {ASSUMED_VOCABULARY:,} (model.vocab_size=N) and"
    observer.note(f"no data at {folder} yet; assumed are{assumed} {recipe.eval.tokens:,} validation tokens")
    return recipe, recipe.eval.tokens


def _target(recipe: Recipe, observer: Notes) -> Target:
    name = recipe.train.device
    try:
        device = pick_device(name)
    except UsageError as error:
        if name.partition(":")[0] not in ("cuda", "mps"):
            raise
        observer.note(f"not probed: {error}")
        device = torch.device(name)
        fast = device.type == "cuda" and recipe.train.dtype == "auto"
        return Target(device, torch.bfloat16 if fast else pick_dtype(recipe.train.dtype, _CPU), present=False)
    return Target(device, pick_dtype(recipe.train.dtype, device), present=True)


def _measured(recipe: Recipe, observer: Notes) -> Probe | None:
    try:
        return run_probe(recipe)
    except ProbeError as error:
        observer.note(f"{error}; memory is an estimate, and there are no hours for this machine")
        return None


def _work(recipe: Recipe, validation_tokens: int) -> Work:
    steps, tokens = batch_plan(recipe).remaining()
    # At each step that reaches a multiple of eval.every, and at the last one.
    before = tokens - recipe.batch_sequences * recipe.seq_len
    validations = before // recipe.eval.every + 1 if recipe.eval.every else 1
    return Work(steps, tokens, validations if validation_tokens else 0, validations * validation_tokens)


def _machine(recipe: Recipe, model: Transformer, work: Work, target: Target, measured: Probe | None) -> dict[str, Any]:
    """Memory by part on the recipe's device, and what the probe says."""
    device = target.device
    sequences = measured.micro_batch if measured else _micro_batch(recipe, target)
    parts = _parts(recipe, model, device, target.dtype, sequences)
    copy = _checkpoint_copy(recipe, model, work)
    if device.type == "cpu":
        # Elsewhere both are memory of the host.
        base = measured.process_memory if measured else process_memory()
        parts |= {"gaps": round(_GAPS * sum(parts.values())), "checkpoint_copy": copy, "process": base or 0}
    accumulation = -(-recipe.batch_sequences // sequences)
    return {
        "device": describe(device) if target.present else f"{device} (not here)",
        "dtype": str(target.dtype).removeprefix("torch."),
        "micro_batch": sequences,
        "accumulation": accumulation,
        "memory": parts | {"total": sum(parts.values())},
        "host_checkpoint_copy": copy,
        "measured": measured and _measurements(measured, recipe, work, accumulation, parts.get("checkpoint_copy", 0)),
    }


def _measurements(probe: Probe, recipe: Recipe, work: Work, accumulation: int, copy: int) -> dict[str, Any]:
    """Of a full batch; a probe saves nothing, so the copy that a run saves from is added to its memory."""
    step_seconds = recipe.batch_sequences / probe.micro_batch * probe.pass_seconds + probe.update_seconds
    return {
        "pass_seconds": probe.pass_seconds,
        "update_seconds": probe.update_seconds,
        "forward_seconds": probe.forward_seconds,
        "step_seconds": step_seconds,
        "tokens_per_second": recipe.batch_sequences * recipe.seq_len / step_seconds,
        "memory": None if probe.memory is None else probe.memory + copy,
        "hours": work.hours(probe, recipe.seq_len),
    }


def _micro_batch(recipe: Recipe, target: Target) -> int:
    return micro_batch_size(recipe, target.device, free=None if target.present else sys.maxsize)


def _checkpoint_copy(recipe: Recipe, model: Transformer, work: Work) -> int:
    """What saving beside training takes of the host's memory; the last save of a run copies nothing."""
    settings = recipe.checkpoint
    before_the_end = any(0 < every < work.tokens for every in (settings.every, settings.keep_every))
    if not settings.asynchronous or not before_the_end:
        return 0
    return 4 * model.num_parameters()["total"] + optimizer_bytes(model, recipe.optimizer)


def _parts(
    recipe: Recipe, model: Transformer, device: torch.device, dtype: torch.dtype, sequences: int
) -> dict[str, int]:
    return training_parts(
        model,
        recipe.optimizer,
        device_type=device.type,
        dtype=dtype,
        compiled=compiles(recipe, model, device),
        sequences=sequences,
        seq_len=recipe.seq_len,
        accumulates=recipe.batch_sequences > sequences,
        recompute=recipe.train.activation_checkpointing,
    )


def _gpu(name: str, gpu: Accelerator, recipe: Recipe, model: Transformer, work: Work) -> dict[str, Any]:
    """One GPU of this kind, by the estimate: the largest automatic micro-batch that fits, or the one given."""
    device, weights = torch.device("cuda"), 4 * model.num_parameters()["total"]
    dtype = torch.float32 if recipe.train.dtype == "float32" else torch.bfloat16
    sequences = micro_batch_size(recipe, device, free=max(int(gpu.memory) - weights, 0))
    memory = sum(_parts(recipe, model, device, dtype, sequences).values())
    while memory > _USABLE * gpu.memory and recipe.train.micro_batch_size == "auto" and sequences > 1:
        sequences = max(size for size in range(1, sequences // 2 + 1) if sequences % size == 0)
        memory = sum(_parts(recipe, model, device, dtype, sequences).values())
    # The peak is that of bf16: no hours are promised for fp32.
    speed = gpu.peak * ASSUMED_UTILISATION / model.flops_per_token(recipe.seq_len)
    return {
        "gpu": name,
        "device_memory": int(gpu.memory),
        "micro_batch": sequences,
        "memory": memory,
        "fits": memory <= _USABLE * gpu.memory,
        "hours": work.hours_at(speed) if dtype == torch.bfloat16 else None,
    }
