"""The training loop, as each process of a run goes through it.

Batches and learning rates are functions of the step, so a run that stops between any two micro-batches and
resumes from its checkpoint repeats an uninterrupted run exactly. All processes take the same decisions; one writes.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightlm import checkpoint, files
from lightlm.data.loader import BatchLoader
from lightlm.data.shards import DataFolder, resolve_dataset
from lightlm.device import describe, peak_flops, pick_dtype
from lightlm.errors import DataError, LightLMError, RecipeError
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe
from lightlm.train.checkpoint import Progress, pack, prune, unpack
from lightlm.train.distributed import World
from lightlm.train.gradients import Gradients, check_shares, micro_batch_size
from lightlm.train.optimizers import build_optimizer, load_named_state, named_state, set_learning_rate
from lightlm.train.parallel import ParallelLoss
from lightlm.train.runs import claim_run
from lightlm.train.schedules import learning_rate_factor
from lightlm.train.signals import stop_on_signals
from lightlm.train.tracking import MetricsFile, Observer, Silent
from lightlm.train.validation import Validation, validate

Sampler = Callable[[Transformer, str], str]


class TrainingDivergedError(LightLMError):
    """The loss or the gradient is no longer a number."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run: Path
    step: int
    tokens: int
    seconds: float
    interrupted: bool
    loss: float | None
    val_loss: float | None
    val_bpb: float | None


def fit_recipe(recipe: Recipe, data: DataFolder, observer: Observer) -> Recipe:
    """The recipe with the vocabulary filled in from the data.

    Raises:
        DataError: the recipe's vocabulary is smaller than the tokenizer's.
    """
    wanted, given = recipe.model.vocab_size, data.tokenizer.vocab_size
    if not wanted:
        return recipe.model_copy(update={"model": replace(recipe.model, vocab_size=given)})
    if wanted < given:
        raise DataError(
            f"recipe {recipe.name} has model.vocab_size {wanted}, but the tokenizer of {data.path} has "
            f"{given} entries; prepare the data with a tokenizer that fits (for example --tokenizer train:{wanted}) "
            f"or set model.vocab_size={given}"
        )
    if wanted > given:
        observer.note(f"model.vocab_size {wanted} exceeds the tokenizer's {given}: {wanted - given} rows stay unused")
    return recipe


def check_prompts(recipe: Recipe, data: DataFolder) -> None:
    """Refuse a prompt too long to be continued now, not at the first validation.

    Raises:
        RecipeError: a prompt of `eval.prompts` fills the model's context.
    """
    for prompt in recipe.eval.prompts:
        length = len(data.tokenizer.encode(prompt))
        if length > recipe.model.max_seq_len:
            raise RecipeError(
                f"a prompt of eval.prompts has {length} tokens, model.max_seq_len is {recipe.model.max_seq_len}; "
                f"shorten it: {prompt[:60]!r}"
            )


class Trainer:
    """A run in progress.

    Args:
        recipe: what to train; its model's vocabulary may come from the data.
        run: the run folder, which exists.
        observer: told of every step, sample and checkpoint.
        sampler: continues a prompt with the model, for the samples during training.
        resume_from: a checkpoint of this run to go on from.
        world: the processes that share the work; each builds a Trainer of its own with the same arguments.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        observer: Observer,
        sampler: Sampler,
        resume_from: Path | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world = world or World()
        observer = observer if world.is_writer else Silent()
        self.run_folder, self.observer, self.sampler = run, observer, sampler
        self.data = DataFolder.open(resolve_dataset(recipe.data.dataset))
        self.recipe = recipe = fit_recipe(recipe, self.data, observer)
        check_prompts(recipe, self.data)
        check_shares(recipe, world.size)
        self.device = world.pick_device(recipe.train.device)
        self.dtype = pick_dtype(recipe.train.dtype, self.device)
        self.batch_tokens = recipe.batch_sequences * recipe.seq_len
        self.progress = Progress()
        torch.manual_seed(recipe.train.seed)
        if resume_from is None:
            self.model = Transformer(recipe.model).to(self.device)
        else:
            self.model = checkpoint.load_model(resume_from, self.device).model
        self.model.train()
        self.parameters = self.model.num_parameters()["total"]
        self.flops_per_token = self.model.flops_per_token(recipe.seq_len)
        self.loss = self._parallel()
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        if resume_from is not None:
            self.progress, optimizer_state = unpack(resume_from, self.data)
            load_named_state(self.model, self.optimizer, optimizer_state)
        self.loader = BatchLoader(
            self.data.split("train"), recipe.seq_len, recipe.train.seed, samples_seen=self.progress.samples
        )
        self.token_bytes = torch.from_numpy(self.data.tokenizer.token_bytes())
        self.gradients = self._gradients()
        if not len(self.data.split("val")):
            observer.note(f"{self.data.path} has no validation split: there will be no validation loss")
        self.last_validation: Validation | None = None
        self.last_loss: float | None = None

    def _parallel(self) -> ParallelLoss:
        recipe = self.recipe.train
        if recipe.parallel == "fsdp" and self.world.size == 1:
            self.observer.note("train.parallel=fsdp has no effect in one process: there is nothing to shard")
        compiled = recipe.compile is True or (recipe.compile == "auto" and self.device.type == "cuda")
        return ParallelLoss(
            self.model, self.world, strategy=recipe.parallel, compiled=compiled, device=self.device, dtype=self.dtype
        )

    def _gradients(self) -> Gradients:
        given = self.recipe.train.micro_batch
        # Free memory may differ between devices: the least decides for all.
        size = self.world.smallest(micro_batch_size(self.recipe, self.device, self.world.size))
        if given not in ("auto", size):
            self.observer.note(
                f"train.micro_batch={given} exceeds the {size} sequences that each process has of a batch"
            )
        return Gradients(
            self.loss,
            self.loader,
            self.world,
            self.observer,
            micro_batch=size,
            adjustable=given == "auto",
            clip=self.recipe.train.grad_clip,
            device=self.device,
            dtype=self.dtype,
        )

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward pass, which may shrink in the first step to what fits into memory."""
        return self.gradients.micro_batch

    @property
    def accumulation(self) -> int:
        return self.gradients.passes(self.recipe.batch_sequences)

    def facts(self) -> dict[str, Any]:
        """What the run is, for the display and for --dry-run."""
        recipe = self.recipe
        return {
            "name": recipe.name,
            "run": str(self.run_folder),
            "parameters": self.parameters,
            "device": describe(self.device),
            "processes": self.world.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data": str(self.data.path),
            "train_tokens": len(self.data.split("train")),
            "tokens": recipe.total_steps * self.batch_tokens,
            "steps": recipe.total_steps,
            "first_step": self.progress.step,
            "batch_tokens": self.batch_tokens,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "epochs": recipe.total_steps * recipe.batch_sequences / self.loader.num_samples,
        }

    def train(self) -> Result:
        """Run to the end of the recipe, or until Ctrl-C or SIGTERM; either way the last step is saved.

        Raises:
            TrainingDivergedError: a loss or gradient is NaN or infinite; the last checkpoint stays as it was.
        """
        metrics_file = self._open_run() if self.world.is_writer else None
        self.observer.start(self.facts())
        steps = self.recipe.total_steps
        try:
            with stop_on_signals(launched=self.world.launch is not None) as stop:
                while self.progress.step < steps:
                    metrics = self._step(stop)
                    if metrics is None:
                        break
                    last = self.progress.step == steps
                    if last or self._due(self.recipe.eval.every):
                        metrics |= self._validate()
                    if metrics_file:
                        metrics_file.write(metrics)
                    self.observer.step(metrics)
                    if last or self._due(self.recipe.checkpoint.every):
                        self._save()
                interrupted = self.progress.step < steps
                if interrupted:
                    self._save()
            # None leaves before the writer's last files are complete: to a launcher, that would be the end.
            self.world.barrier()
        finally:
            if metrics_file:
                metrics_file.close()
        return self._result(interrupted)

    def _open_run(self) -> MetricsFile:
        """What only the writer does at the start: the run's files, and `runs/latest`."""
        files.write_text(self.run_folder / "recipe.yaml", self.recipe.to_yaml())
        if self.world.launch is not None:
            claim_run(self.run_folder, self.world.launch)
        checkpoint.mark_latest(self.run_folder)
        return MetricsFile(self.run_folder / "metrics.jsonl", self.progress.step)

    def _due(self, every: int) -> bool:
        """Whether the last step crossed a multiple of `every` tokens."""
        tokens = self.progress.tokens
        return every > 0 and tokens // every > (tokens - self.batch_tokens) // every

    def _step(self, stop: threading.Event) -> dict[str, Any] | None:
        """One optimizer step on one global batch: its metrics, or None if a signal came first."""
        started = time.perf_counter()
        recipe, before = self.recipe, self.progress
        if (outcome := self.gradients(before.samples, recipe.batch_sequences, stop)) is None:
            return None
        loss, norm = outcome.loss, outcome.norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(before.step + 1, loss, norm)
        middle = before.tokens + self.batch_tokens // 2
        lr = recipe.optimizer.lr * learning_rate_factor(recipe.schedule, middle, recipe.total_steps * self.batch_tokens)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.progress = Progress(
            before.step + 1,
            before.tokens + self.batch_tokens,
            before.samples + recipe.batch_sequences,
            before.seconds + seconds,
        )
        self.last_loss = loss
        metrics = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": self.batch_tokens / seconds,
            "seconds": self.progress.seconds,
        }
        if self.dtype != torch.float32 and (peak := peak_flops(self.device)):
            metrics["mfu"] = self.flops_per_token * metrics["tokens_per_second"] / peak
        return metrics

    def _diverged(self, step: int, loss: float, norm: float) -> None:
        saved = checkpoint.checkpoints(self.run_folder)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved yet"
        raise TrainingDivergedError(
            f"training diverged at step {step}: loss {loss}, gradient norm {norm}; {kept}. "
            f"Try a lower optimizer.lr (now {self.recipe.optimizer.lr:g}), a longer schedule.warmup, "
            "or train.dtype=float32"
        )

    def _validate(self) -> dict[str, float]:
        recipe = self.recipe
        self._sample()
        if not len(self.data.split("val")):
            return {}
        self.last_validation = result = validate(
            self.loss,
            self.data.split("val"),
            self.token_bytes,
            seq_len=recipe.seq_len,
            max_tokens=recipe.eval.tokens,
            batch_size=self.micro_batch,
            dtype=self.dtype,
            world=self.world,
        )
        return {"val_loss": result.loss, "val_bpb": result.bits_per_byte}

    def _sample(self) -> None:
        """Let the model continue the recipe's prompts."""
        if not self.recipe.eval.prompts:
            return
        model = self.loss.whole_model()
        if not self.world.is_writer:
            return
        samples = self.run_folder / "samples" / f"{checkpoint.step_name(self.progress.step)}.txt"
        samples.parent.mkdir(exist_ok=True)
        texts = []
        for prompt in self.recipe.eval.prompts:
            text = self.sampler(model, prompt)
            texts.append(prompt + text)
            self.observer.sample(self.progress.step, prompt, text)
        files.write_text(samples, "\n\n---\n\n".join(texts) + "\n")

    def _save(self) -> None:
        """Write a checkpoint of the last completed step, unless it is there already, and drop old ones."""
        step = self.progress.step
        marker = self.run_folder / "checkpoints" / checkpoint.step_name(step) / checkpoint.MARKER
        if not self.world.from_writer(marker.is_file):
            # Gathering a sharded run takes all processes.
            if self.world.is_writer or self.loss.sharded:
                model = self.loss.whole_model()
                state = pack(self.progress, named_state(self.model, self.optimizer), self.data)
            if self.world.is_writer:
                path = checkpoint.write_checkpoint(self.run_folder, step, model, self.data.tokenizer, state)
                self.observer.checkpoint(path)
        if self.world.is_writer:
            prune(self.run_folder, self.recipe.checkpoint.keep_last)

    def _result(self, interrupted: bool) -> Result:
        progress, validation = self.progress, self.last_validation
        return Result(
            self.run_folder,
            progress.step,
            progress.tokens,
            progress.seconds,
            interrupted,
            self.last_loss,
            validation.loss if validation else None,
            validation.bits_per_byte if validation else None,
        )
