"""The parts of a run, built from its recipe: training, the planning probe and `--dry-run` share them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightlm import checkpoint, cpu
from lightlm.data.folder import check_data_of_run
from lightlm.data.loader import BatchLoader
from lightlm.data.mixture import ONE_SOURCE
from lightlm.data.shards import TokenStream
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.training_data import TrainingData, folder_paths
from lightlm.device import describe, keep_freed_memory, training_dtype
from lightlm.errors import RecipeError
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.optim.state import load_named_state
from lightlm.recipe import Recipe, load_run_recipe, span_tokens
from lightlm.runs import RECIPE, run_of
from lightlm.train.checkpointing.resume import Progress, unpack
from lightlm.train.distributed import World
from lightlm.train.fitting import fit_recipe
from lightlm.train.initial import Note, load_initial
from lightlm.train.schedules import (
    BatchPlan,
    batch_plan,
    begin_rewarmup,
    describe_schedule,
    note_on_idle_end,
    note_on_resume,
    notes_on_short_spans,
    source_order,
)
from lightlm.train.step.averaging import WeightAverage
from lightlm.train.step.compilation import compiles
from lightlm.train.step.gradients import Gradients, check_shares, micro_batch_size
from lightlm.train.step.parallel import ParallelLoss
from lightlm.train.step.scaling import LossScale
from lightlm.train.teaching.load import Taught, load_taught


@dataclass(frozen=True)
class Setup:
    """All parts of a run.

    Attributes:
        recipe: with `model.vocab_size`, `train.compile`, `train.dtype` and, on a CPU, `train.threads` filled in.
        data: None for random tokens, with which a run can be measured but not trained.
        tokenizer: that of the data; of a model that the run starts from, also what it expects before a text.
        progress: where the run starts.
        resumed_from: the checkpoint that it continues from.
        average: with `train.ema`.
        taught: with `train.distill`, the teacher.
    """

    recipe: Recipe
    data: TrainingData | None
    tokenizer: Tokenizer | None
    world: World
    device: torch.device
    dtype: torch.dtype
    model: Transformer
    loss: ParallelLoss
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    gradients: Gradients
    batches: BatchPlan
    progress: Progress
    resumed_from: Path | None
    average: WeightAverage | None
    taught: Taught | None

    @property
    def teacher(self) -> str | None:
        """The identity of the teacher; None without one."""
        return self.taught.identity if self.taught else None

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run: `train.tokens` in whole batches."""
        return self.batches.remaining(self.progress.tokens)[1]

    def facts(self) -> dict[str, Any]:
        """Return the sizes of the run, for displays and `--dry-run`; None for what only the data says."""
        recipe, parameters, data = self.recipe, self.model.num_parameters(), self.data
        samples = self.total_tokens // recipe.seq_len
        return {
            "parameters": parameters["total"],
            "active_parameters": parameters["active"],
            "mtp_parameters": self.model.mtp_parameters,
            "flops_per_token": self.model.flops_per_token(recipe.seq_len),
            "device": describe(self.device),
            "processes": self.world.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data": ", ".join(map(str, folder_paths(recipe.data.sources).values())),
            "train_tokens": data.tokens("train") if data else None,
            "tokens": self.total_tokens,
            "steps": self.progress.step + self.batches.remaining(self.progress.tokens)[0],
            "schedule": describe_schedule(recipe),
            "first_step": self.progress.step,
            "first_batch_tokens": self.batches.sequences(0) * recipe.seq_len,
            "batch_tokens": recipe.batch_sequences * recipe.seq_len,
            "micro_batch": self.gradients.micro_batch,
            "accumulation": self.gradients.passes(recipe.batch_sequences),
            "compile": recipe.train.compile,
            "epochs": self.loader.epochs(samples)[0] if data and not data.mixed else None,
            "sources": self.sources(samples) if data and data.mixed else None,
            "teacher": self.taught.description if self.taught else None,
        }

    @property
    def last_shares(self) -> dict[str, float]:
        """The share of each source in the last stage."""
        assert self.data is not None
        return dict(zip(self.data.folders, map(float, self.loader.order.stages[-1].shares), strict=True))

    def sources(self, samples: int) -> list[dict[str, Any]]:
        """Return name, tokens and epochs of each source in the run's first `samples` sequences."""
        assert self.data is not None
        sizes = {name: len(stream) for name, stream in self.data.streams("train").items()}
        sizes |= {name: len(packing) * self.recipe.seq_len for name, packing in self.loader.packings.items()}
        counts = self.loader.order.counts(samples).tolist()
        return [
            {"name": name, "train_tokens": size, "tokens": count * self.recipe.seq_len, "epochs": epochs}
            for (name, size), count, epochs in zip(sizes.items(), counts, self.loader.epochs(samples), strict=True)
        ]


def set_up(
    recipe: Recipe, data: TrainingData | None, note: Note, world: World | None = None, resume_from: Path | None = None
) -> Setup:
    """Build all parts of a run. Each process of a run calls this with the same arguments.

    Args:
        data: see `open_data`; None takes random tokens, for measurements of a new run.
        note: in the process that writes, receives what the user should know, such as a setting without effect.
        resume_from: the newest undamaged checkpoint of the run to resume.

    Raises:
        DataError, RecipeError, UsageError, CheckpointError: data, recipe, device and checkpoint do not fit together.
    """
    world = world or World()
    note = note if world.is_writer else lambda message: None
    recipe = fit_recipe(recipe, data, note)
    batches = batch_plan(recipe)
    check_shares(recipe, batches, world.size)
    device = world.pick_device(recipe.train.device)
    threads = _use_threads(recipe, device, world, note)
    # Measured for `auto` on a CPU, so one process decides. The run's recipe.yaml records it, as it does `compile`.
    wanted, width = recipe.train.dtype, recipe.model.hidden_size
    dtype = world.from_writer(lambda: training_dtype(wanted, device, width, lambda slow: note(f"train.dtype={slow}")))
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda" and dtype == torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32; under autocast, the few fp32 products stay exact
    torch.manual_seed(recipe.train.seed)
    loaded = None
    if resume_from is not None:
        loaded = _load_checkpoint(resume_from, device)
    elif recipe.train.init_from is not None and data is not None:  # else only a step is measured
        loaded = load_initial(recipe, data.main, world, note)
    model = (loaded.model if loaded else Transformer(recipe.model, recipe.train.mtp.depth)).to(device)
    model.train()
    model.recompute_blocks = recipe.train.activation_checkpointing
    compiled = compiles(recipe, model, device, dtype, note)
    resolved: dict[str, Any] = {"threads": threads, "compile": compiled, "dtype": str(dtype).removeprefix("torch.")}
    taught = load_taught(recipe, data, world, device, note)
    if taught is not None:
        resolved["distill"] = taught.section
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=resolved)})
    if recipe.train.parallel == "fsdp" and world.size == 1:
        note("train.parallel=fsdp has no effect in one process: there is nothing to shard")
    separator = data.end_of_text_id if data else 0  # of random tokens, any
    document_separator = separator if recipe.data.document_mask else None
    teacher = taught.live if taught else None
    loss = ParallelLoss(model, world, recipe, device, dtype, document_separator, teacher)
    # Before the optimizer's state takes memory, so that a resumed run gets the size of a new one. Free memory may
    # differ between devices: the smallest size serves all.
    size = min(world.gather(micro_batch_size(recipe, device, world.size, dtype=dtype)))
    optimizer = build_optimizer(model, recipe.optimizer, dtype)
    progress = Progress()
    if resume_from is not None:
        assert data is not None, "a run resumes with its data"
        progress, optimizer_state = unpack(resume_from, data, recipe, taught.identity if taught else None)
        load_named_state(model, optimizer, optimizer_state)
        recipe = begin_rewarmup(recipe, progress.tokens)
        if world.is_writer:
            _note_schedule(recipe, resume_from, progress, note)
    elif recipe.schedule.warms_up_again and recipe.schedule.rewarmup_from is None:
        raise RecipeError("schedule.rewarmup is for a run that resumes from a checkpoint; leave it out of a new run")
    else:
        for text in notes_on_short_spans(recipe):
            note(text)
    loader = _loader(recipe, data, taught)
    _note_conversations(loader, recipe, note)
    given = recipe.train.micro_batch_size
    if given not in ("auto", size):
        note(f"train.micro_batch_size={given} exceeds the {size} sequences that each process has of a batch")
    gradients = Gradients(loss, loader, recipe, size, note, LossScale(dtype, progress.loss_scale))
    average = _average(recipe, loss, progress, resume_from)
    progress = replace(progress, averaged_from=average.began if average else None)
    return Setup(
        recipe, data, _tokenizer(data, loaded), world, device, dtype, model, loss, optimizer, loader, gradients,
        batches, progress, resume_from, average, taught,
    )  # fmt: skip


def _use_threads(recipe: Recipe, device: torch.device, world: World, note: Note) -> int | str:
    """Let torch compute with `train.threads` where that applies; return their number, or the setting."""
    threads = recipe.train.threads
    if device.type == "cpu" and world.size == 1:
        return cpu.use_threads(threads, note, recipe.model.hidden_size)
    if device.type != "cpu" and threads != "auto":
        note(f"train.threads={threads} has no effect: it is for training on a CPU")
    elif world.size > 1 and device.type == "cpu" and threads not in ("auto", torch.get_num_threads()):
        note(f"train.threads={threads} is for one process; each of the {world.size} has {torch.get_num_threads()}")
    return threads


def _load_checkpoint(folder: Path, device: torch.device) -> checkpoint.LoadedModel:
    """Load the model of a checkpoint to train on: its last weights, not their average."""
    last = "raw" if checkpoint.has_average(folder) else None
    loaded = checkpoint.load_model(folder, device, weights=last, mtp=True)
    if device.type == "cpu":  # no part of the file is kept, which Windows could not delete then
        _own_memory(loaded.model)
    return loaded


def _tokenizer(data: TrainingData | None, loaded: checkpoint.LoadedModel | None) -> Tokenizer | None:
    """Return the data's tokenizer, used as the model that the run starts from and the data's conversations use it."""
    if data is None:
        return None
    tokenizer = data.tokenizer
    if loaded is not None:  # the data's does not say what comes before a text
        tokenizer = tokenizer.used_like(loaded.tokenizer)
    return tokenizer if data.chat is None else tokenizer.chatting_like(data.chat.tokenizer)


def _loader(recipe: Recipe, data: TrainingData | None, taught: Taught | None) -> BatchLoader:
    if data is not None:
        streams, order = data.streams("train"), source_order(recipe)
    else:  # random tokens of one global batch: the cost of a step does not depend on what they say
        generator = np.random.default_rng(recipe.train.seed % 2**64)
        tokens = generator.integers(recipe.model.vocab_size, size=recipe.train.batch_tokens + 1)
        streams, order = {"random tokens": TokenStream([tokens], 0)}, ONE_SOURCE
    return BatchLoader(
        streams, recipe.seq_len, recipe.train.seed, order,
        shift_windows=recipe.data.shift_windows, too_long=recipe.data.too_long,
        taught=taught.records if taught else (),
    )  # fmt: skip


def _note_conversations(loader: BatchLoader, recipe: Recipe, note: Note) -> None:
    """Tell which conversations are cut or left out, and whether those of one sequence see each other."""
    for name, packing in loader.packings.items():
        for count, what in ((packing.cut, "cut to that length"), (packing.left_out, "left out")):
            if count:
                note(f"{name}: {count:,} conversations do not fit into {recipe.seq_len + 1:,} tokens and are {what}")
    if loader.packings and recipe.data.shift_windows:
        note(
            f"data.shift_windows does not apply to conversations ({', '.join(loader.packings)}), which are packed whole"
        )
    if loader.packings and not recipe.data.document_mask:
        note(
            f"conversations of {', '.join(loader.packings)} that share a sequence see each other; "
            "data.document_mask=true keeps them apart"
        )


def _own_memory(model: Transformer) -> None:
    """Move a model's tensors from the file that they are mapped from to memory of their own."""
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def _average(recipe: Recipe, loss: ParallelLoss, progress: Progress, resume_from: Path | None) -> WeightAverage | None:
    """Return the average of the weights with `train.ema`: the checkpoint's, or a new one that begins here."""
    if not recipe.train.averages:
        return None
    half_life = max(span_tokens(recipe.train.ema, recipe.train.tokens), 1)
    if resume_from is None or progress.averaged_from is None:
        return WeightAverage(loss, half_life, progress.tokens)
    return WeightAverage(loss, half_life, progress.averaged_from, checkpoint.load_weights(resume_from))


def _note_schedule(recipe: Recipe, resume_from: Path, progress: Progress, note: Note) -> None:
    """Tell what a resumed run does with the learning rate, where the user might not expect it."""
    run, texts = run_of(resume_from), [note_on_idle_end(recipe)]
    if run is not None and (run / RECIPE).is_file():  # still the recipe of the run so far
        texts.append(note_on_resume(load_run_recipe(run), recipe, progress.tokens))
    for text in filter(None, texts):
        note(text)


def open_data(recipe: Recipe, *, required: bool = True, resumed: Path | None = None) -> TrainingData | None:
    """Open the recipe's data folders. If they are not `required` and one does not exist, return None.

    Args:
        resumed: the run that continues on this data, for messages.

    Raises:
        DataError: a folder is missing or damaged, or their tokenizers differ.
    """
    paths = folder_paths(recipe.data.sources)
    if required and resumed is not None:
        check_data_of_run(paths.values(), resumed, recipe.data.key)
    return TrainingData.open(recipe.data) if required or all(path.is_dir() for path in paths.values()) else None
