"""The training loop, as each process of a run goes through it.

Batches and learning rates are functions of the step, so a run that stops between any two micro-batches and
resumes from its checkpoint repeats an uninterrupted run exactly. All processes take the same decisions; one writes.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightlm import checkpoint, files
from lightlm.data.folder import DataFolder, resolve_dataset
from lightlm.data.loader import BatchLoader
from lightlm.device import describe, keep_freed_memory, peak_flops, pick_dtype
from lightlm.errors import LightLMError
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe
from lightlm.train.batches import batch_plan
from lightlm.train.checkpointing.saving import Saver, tidy
from lightlm.train.checkpointing.state import Progress, pack, unpack
from lightlm.train.distributed import PeerLostError, World
from lightlm.train.observe.expert_loads import load_metrics
from lightlm.train.observe.metrics import peak_memory, step_metrics
from lightlm.train.observe.observers import MetricsFile, Observer, Silent
from lightlm.train.observe.spikes import Verdict, judge
from lightlm.train.optim.optimizers import (
    build_optimizer,
    learning_rates,
    load_named_state,
    named_state,
    set_learning_rate,
)
from lightlm.train.rng import preserved
from lightlm.train.runs import claim_run
from lightlm.train.schedules import learning_rate_factor
from lightlm.train.setup import check_prompts, fit_recipe
from lightlm.train.signals import stop_on_signals
from lightlm.train.step.compilation import compiles
from lightlm.train.step.gradients import BatchOutcome, Gradients, check_shares, micro_batch_size
from lightlm.train.step.parallel import ParallelLoss
from lightlm.train.step.routers import move_selection_biases, router_losses
from lightlm.train.validation import Validation, validate

Sampler = Callable[[Transformer, str], str]
Evaluator = Callable[[Transformer, Path, threading.Event], dict[str, float] | None]


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


class Trainer:
    """A run in progress.

    Args:
        recipe: what to train; its model's vocabulary may come from the data.
        run: the run folder, which exists.
        observer: told of every step, sample and checkpoint.
        sampler: continues a prompt with the model, for the samples during training.
        resume_from: the newest whole checkpoint of this run, to go on from (`runs.reopen_run`).
        world: the processes that share the work; each builds a Trainer of its own with the same arguments.
        evaluator: scores the model on the recipe's `eval.tasks`, as `task/metric`; all processes call it together. The
            path is that of the step's checkpoint, which need not exist. None if the event was set before the end.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        observer: Observer,
        sampler: Sampler,
        resume_from: Path | None = None,
        world: World | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.world = world = world or World()
        observer = observer if world.is_writer else Silent()
        self.run_folder, self.observer, self.sampler, self.evaluator = run, observer, sampler, evaluator
        self.data = DataFolder.open(resolve_dataset(recipe.data.dataset))
        self.recipe = recipe = fit_recipe(recipe, self.data, observer)
        check_prompts(recipe, self.data)
        self.plan = batch_plan(recipe)
        check_shares(recipe, self.plan, world.size)
        self.device = world.pick_device(recipe.train.device)
        self.dtype = pick_dtype(recipe.train.dtype, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.progress = Progress()
        self.resumed_from = resume_from
        torch.manual_seed(recipe.train.seed)
        if resume_from is None:
            self.model = Transformer(recipe.model).to(self.device)
        else:
            self.model = checkpoint.load_model(resume_from, self.device).model
        self.model.train()
        self.model.recompute_blocks = recipe.train.activation_checkpointing
        self.parameters = self.model.num_parameters()
        self.flops_per_token = self.model.flops_per_token(recipe.seq_len)
        compiled = {"compile": compiles(recipe, self.model, self.device)}
        self.recipe = recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=compiled)})
        self.loss = self._parallel()
        self.optimizer = build_optimizer(self.model, recipe.optimizer, self.dtype)
        if resume_from is not None:
            self.progress, optimizer_state = unpack(resume_from, self.data)
            load_named_state(self.model, self.optimizer, optimizer_state)
        self.step_began = self.progress.tokens  # of the last step
        steps_left, self.total_tokens = self.plan.remaining(self.progress.tokens)
        self.total_steps = self.progress.step + steps_left
        self.loader = BatchLoader(self.data.split("train"), recipe.seq_len, recipe.train.seed)
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
        return ParallelLoss(
            self.model,
            self.world,
            strategy=recipe.parallel,
            compiled=recipe.compile is True,
            device=self.device,
            dtype=self.dtype,
            router_losses=router_losses(self.recipe),
        )

    def _gradients(self) -> Gradients:
        given = self.recipe.train.micro_batch_size
        # Free memory may differ between devices: the least decides for all.
        size = self.world.smallest(micro_batch_size(self.recipe, self.device, self.world.size))
        if given not in ("auto", size):
            self.observer.note(
                f"train.micro_batch_size={given} exceeds the {size} sequences that each process has of a batch"
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
            "parameters": self.parameters["total"],
            "active_parameters": self.parameters["active"],
            "flops_per_token": self.flops_per_token,
            "device": describe(self.device),
            "processes": self.world.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data": str(self.data.path),
            "train_tokens": len(self.data.split("train")),
            "tokens": self.total_tokens,
            "steps": self.total_steps,
            "first_step": self.progress.step,
            "first_batch_tokens": self.plan.sequences(0) * recipe.seq_len,
            "batch_tokens": recipe.batch_sequences * recipe.seq_len,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "compile": self.recipe.train.compile,
            "epochs": self.total_tokens / recipe.seq_len / self.loader.num_samples,
        }

    def train(self) -> Result:
        """Run to the end of the recipe, or until Ctrl-C or SIGTERM; either way the last step is saved.

        Raises:
            TrainingDivergedError: a loss or gradient is NaN or infinite, and with `train.skip_spikes` so were those
                of the steps before it; the last checkpoint stays as it was.
        """
        settings = self.recipe.checkpoint
        metrics_file = self._open_run() if self.world.is_writer else None
        self.observer.start(self.facts() | {"logged_step": metrics_file.logged_step if metrics_file else 0})
        try:
            with self._saver() as saver, stop_on_signals(launched=self.world.launch is not None) as stop:
                while not self.done:
                    metrics = self._step(stop)
                    if metrics is None:
                        break
                    metrics |= self._evaluate(stop)
                    if metrics_file:
                        metrics_file.write(metrics)
                    self.observer.step(metrics)
                    if saver:
                        saver.report()
                    if self.done or self._due(settings.every) or self._due(settings.keep_every):
                        self._save(saver, wait=self.done)
                interrupted = not self.done
                if interrupted:
                    self._save(saver, wait=True)
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
        tidy(self.run_folder, self.resumed_from, self.observer)
        return MetricsFile(self.run_folder / "metrics.jsonl", self.progress.step)

    @property
    def done(self) -> bool:
        """Whether the run has all its tokens."""
        return self.progress.tokens >= self.recipe.train.tokens

    def _due(self, every: int) -> bool:
        """Whether the last step crossed a multiple of `every` tokens."""
        return every > 0 and self.progress.tokens // every > self.step_began // every

    def _step(self, stop: threading.Event) -> dict[str, Any] | None:
        """One optimizer step on one global batch: its metrics, or None if a signal came first."""
        started, waited = time.perf_counter(), self.gradients.seconds_waited
        recipe, before = self.recipe, self.progress
        sequences = self.plan.sequences(before.tokens)
        batch_tokens = sequences * recipe.seq_len
        if (outcome := self.gradients(before.samples, sequences, stop)) is None:
            return None
        verdict = judge(before.spikes, outcome.loss, outcome.norm, recipe.train)
        if verdict.diverged:
            self._diverged(before.step + 1, outcome)
        middle = before.tokens + batch_tokens // 2
        set_learning_rate(self.optimizer, learning_rate_factor(recipe.schedule, middle, self.total_tokens))
        if not verdict.skip:
            self.optimizer.step()
            if outcome.load_LE is not None and (rate := recipe.router_training.bias_update_rate):
                move_selection_biases(self.model, outcome.load_LE, rate)
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.step_began = before.tokens
        self.progress = Progress(
            before.step + 1,
            before.tokens + batch_tokens,
            before.samples + sequences,
            before.seconds + seconds,
            verdict.history,
        )
        self.last_loss = outcome.loss if math.isfinite(outcome.loss) else self.last_loss
        peak = peak_flops(self.device) if self.dtype != torch.float32 else None
        metrics = step_metrics(
            self.progress,
            batch_tokens=batch_tokens,
            loss=outcome.loss,
            rates=learning_rates(self.optimizer),
            grad_norm=outcome.norm,
            step_seconds=seconds,
            data_seconds=self.gradients.seconds_waited - waited,
            memory=peak_memory(self.device),
            utilisation_per_token=self.flops_per_token / (peak * self.world.size) if peak else None,
        )
        metrics |= load_metrics(self.model, self.progress.step, batch_tokens, outcome.loads)
        return metrics | self._spike_metrics(verdict)

    def _spike_metrics(self, verdict: Verdict) -> dict[str, bool]:
        """What metrics.jsonl says of a spike; the first of several in a row is also noted."""
        if not verdict.spike:
            return {}
        if verdict.history.in_a_row == 1:
            done = "; the step is skipped" if verdict.skip else ""
            self.observer.note(f"spike at step {self.progress.step}: {verdict.reason}{done}")
        return {"spike": True} | ({"skipped": True} if verdict.skip else {})

    def _diverged(self, step: int, outcome: BatchOutcome) -> None:
        saved = checkpoint.checkpoints(self.run_folder)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved yet"
        raise TrainingDivergedError(
            f"training diverged at step {step}: loss {outcome.loss}, gradient norm {outcome.norm}; {kept}. "
            f"Try a lower optimizer.lr (now {self.recipe.optimizer.lr:g}), a longer schedule.warmup, "
            "or train.dtype=float32"
        )

    def _evaluate(self, stop: threading.Event) -> dict[str, float]:
        """Whatever is due after this step: samples, validation loss, and the scores of `eval.tasks`."""
        metrics: dict[str, float] = {}
        if self.done or self._due(self.recipe.eval.every):
            self._sample()
            metrics |= self._validate()
        if self.recipe.eval.tasks and (self.done or self._due(self.recipe.eval.tasks_every)):
            metrics |= self._score_tasks(stop)
        return metrics

    def _validate(self) -> dict[str, float]:
        recipe = self.recipe
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

    def _score_tasks(self, stop: threading.Event) -> dict[str, float]:
        """The scores of `eval.tasks`; a task that fails, by whatever error, is noted and costs no training."""
        model = self.loss.whole_model()
        if self.evaluator is None:
            return {}
        name = checkpoint.step_name(self.progress.step)
        try:
            with preserved(model):
                scores = self.evaluator(model, self.run_folder / "checkpoints" / name, stop)
        except PeerLostError:
            raise
        except Exception as error:
            self.observer.note(f"eval.tasks could not be scored at step {self.progress.step}: {error}")
            return {}
        if scores is None:
            self.observer.note(
                f"a signal broke off eval.tasks at step {self.progress.step}; score it with `lightlm eval`"
            )
            return {}
        return {f"eval/{task}": value for task, value in scores.items()}

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

    def _saver(self) -> contextlib.AbstractContextManager[Saver | None]:
        if not self.world.is_writer:
            return contextlib.nullcontext()
        return Saver(self.run_folder, self.recipe.checkpoint, self.data.tokenizer, self.model.config, self.observer)

    def _save(self, saver: Saver | None, *, wait: bool) -> None:
        """Save the last completed step. Gathering a sharded run takes all processes; one of them writes."""
        if saver is None and not self.loss.sharded:
            return
        weights = self.loss.whole_model().state_dict()
        state = pack(self.progress, named_state(self.model, self.optimizer), self.data)
        if saver is not None:
            saver.save(
                self.progress.step, weights, state, milestone=self._due(self.recipe.checkpoint.keep_every), wait=wait
            )

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
