"""The training loop of each process of a run.

Batches and learning rates are functions of the tokens seen. So a run that stops between two micro-batches and resumes
from its checkpoint repeats an uninterrupted run exactly. All processes take the same decisions; one writes.

A step is finished in this order: update, checkpoint if one is due, evaluation if one is due, row in metrics.jsonl. The
checkpoint holds the row, so a run that ends within an evaluation repeats that evaluation when it resumes.
"""

import contextlib
import math
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightlm import checkpoint, files
from lightlm.device import peak_flops
from lightlm.errors import TrainingDivergedError
from lightlm.machine import record_machine
from lightlm.optim.groups import learning_rates, set_step
from lightlm.optim.state import named_state
from lightlm.runs import RECIPE, mark_latest
from lightlm.train.checkpointing.resume import Progress, pack
from lightlm.train.checkpointing.saving import Saver, tidy
from lightlm.train.evaluations import Evaluations, Evaluator, Sampler
from lightlm.train.observe.expert_loads import load_metrics
from lightlm.train.observe.metrics import MetricsFile, peak_memory
from lightlm.train.observe.observers import Observer
from lightlm.train.observe.slowness import SlowSteps
from lightlm.train.observe.spikes import judge
from lightlm.train.schedules import mtp_weight, scheduled_metrics, step_settings
from lightlm.train.setup import Setup
from lightlm.train.signals import stop_on_signals
from lightlm.train.step.gradients import BatchOutcome
from lightlm.train.step.routers import move_selection_biases

_MOVED = (
    "this run comes from another computer; unless set now, precision, threads and compilation are those chosen there "
    "(train.dtype=auto train.threads=auto train.compile=auto choose anew)"
)


@dataclass
class _DivergenceError(Exception):
    step: int
    outcome: BatchOutcome


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
    stopped_early: bool = False  # by `train.patience`
    best_val_loss: float | None = None
    best_step: int | None = None


class Trainer:
    """A run in progress.

    Args:
        setup: the parts of the run, with data. Each process has a Trainer of its own.
        run: the run folder, which exists.
        observer: receives every step, sample and checkpoint.
        sampler: continues a prompt with the model, for the samples during training; `sample_text` by default.
        evaluator: scores the model on the recipe's `eval.tasks`, as `task/metric`; all processes call it together. The
            path is that of the step's checkpoint, which need not exist. It returns None if the event was set before
            the end.
    """

    def __init__(
        self,
        setup: Setup,
        run: Path,
        observer: Observer,
        sampler: Sampler | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        assert setup.data is not None
        assert setup.tokenizer is not None
        self.setup, self.recipe, self.data, self.world = setup, setup.recipe, setup.data, setup.world
        self.tokenizer = setup.tokenizer
        self.model, self.loss, self.optimizer = setup.model, setup.loss, setup.optimizer
        self.gradients, self.progress, self.total_tokens = setup.gradients, setup.progress, setup.total_tokens
        self.average = setup.average
        self.best = self.progress.best  # with the last step's validation, once that is done
        self.run_folder = run
        self.observer = observer if self.world.is_writer else Observer()
        self.evaluations = Evaluations(setup, run, self.observer, sampler, evaluator)
        self.flops_per_token = self.model.flops_per_token(self.recipe.seq_len)
        self.step_began = self.progress.tokens  # tokens before the last step
        self.last_validation: dict[str, float] = {}
        self.last_loss: float | None = None
        self.saved_at = time.monotonic()
        self.slow_steps = SlowSteps(setup.device, self.world.local_size)

    def facts(self) -> dict[str, Any]:
        """Return what the run is, for displays and for machine.json."""
        return {"name": self.recipe.name, "run": str(self.run_folder), **self.setup.facts()}

    def train(self) -> Result:
        """Train to the end of the recipe, or until Ctrl-C, SIGTERM or SIGHUP; all save the last step.

        A signal also ends an evaluation. The run then counts as interrupted, even after its last step.

        Raises:
            TrainingDivergedError: a loss or gradient is NaN or infinite, and with `train.skip_spikes` so were those
                of the steps before it. The last checkpoint stays as it was.
        """
        run, metrics_file, saver, moved = self.run_folder, None, None, False
        try:
            with contextlib.ExitStack() as stack:
                if self.world.is_writer:
                    files.write_text(run / RECIPE, self.recipe.to_yaml())
                    mark_latest(run)
                    moved = record_machine(run, self.setup.device, self.facts())
                    tidy(run, self.setup.resumed_from, self.observer)
                    metrics_file = stack.enter_context(MetricsFile(run, self.progress.step))
                    saver = stack.enter_context(
                        Saver(run, self.recipe.checkpoint, self.tokenizer, self.model.config, self.observer)
                    )
                self.observer.start(self.facts() | {"logged_step": metrics_file.logged_step if metrics_file else 0})
                if moved:
                    self.observer.note(_MOVED)
                stop = stack.enter_context(stop_on_signals(launched=self.world.launched))
                interrupted = not self._begin(stop, metrics_file, saver)
                while not (interrupted or self.ended):
                    if self._step(stop):
                        if self._save_is_due():
                            self._save(saver, wait=self._evaluation_is_due())
                        interrupted = not self._finish_step(stop, metrics_file, saver)
                    else:
                        interrupted = True
                    if saver:
                        saver.report()
                if interrupted or self.stopped_early:
                    self._save(saver, wait=True)
                # No process leaves before the writer's last files are complete: a launcher would end the writer.
                # Signals are still handled here, since a launcher may repeat one late.
                self.world.barrier()
        except _DivergenceError as found:  # the saver has completed its last checkpoint, which the message names
            raise self._divergence(found.step, found.outcome) from None
        return Result(
            run=run,
            step=self.progress.step,
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
            interrupted=interrupted,
            loss=self.last_loss,
            val_loss=self.last_validation.get("val_loss"),
            val_bpb=self.last_validation.get("val_bpb"),
            stopped_early=self.stopped_early and not interrupted,
            best_val_loss=self.best.val_loss,
            best_step=self.best.step or None,
        )

    @property
    def done(self) -> bool:
        """Whether the run has seen all its tokens."""
        return self.progress.tokens >= self.recipe.train.tokens

    @property
    def stopped_early(self) -> bool:
        """Whether the last validations bring the run to its end before it has seen all its tokens."""
        patience = self.recipe.train.patience
        return not self.done and patience is not None and self.best.validations_since >= patience

    @property
    def ended(self) -> bool:
        """Whether no step is left."""
        return self.done or self.stopped_early

    def _due(self, every: int) -> bool:
        """Return whether the last step crossed a multiple of `every` tokens."""
        return every > 0 and self.progress.tokens // every > self.step_began // every

    def _save_is_due(self) -> bool:
        """Return whether to save the last step: by tokens, by the clock, or as the run's last."""
        settings = self.recipe.checkpoint
        if self.done or self._due(settings.every) or self._due(settings.keep_every):
            return True
        if not settings.every_minutes:
            return False
        late = self.world.is_writer and time.monotonic() - self.saved_at >= 60 * settings.every_minutes
        # All processes save a sharded run, so they follow the writer's clock. Otherwise only the writer saves.
        return self.world.any(late)[0] if self.loss.sharded else late

    def _evaluation_is_due(self) -> bool:
        return self.done or self._due(self.recipe.eval.every) or self._scores_are_due()

    def _scores_are_due(self) -> bool:
        return bool(self.recipe.eval.tasks) and (self.ended or self._due(self.recipe.eval.tasks_every))

    def _begin(self, stop: threading.Event, metrics_file: MetricsFile | None, saver: Saver | None) -> bool:
        """Do what comes before the first step of this process; return False after a signal, as `_finish_step`.

        A run that starts from a model validates it: its metrics get a row of step 0.
        """
        if self.progress.step or self.recipe.train.init_from is None:
            return self._finish_resumed_step(stop, metrics_file, saver)
        if (losses := self.evaluations.losses(stop)) is None:
            return False
        if losses:
            self.last_validation = losses
            metrics = {"step": 0, "tokens": 0} | losses
            if metrics_file:
                metrics_file.write(metrics)
            self.observer.initial(metrics)
        return True

    def _finish_resumed_step(
        self, stop: threading.Event, metrics_file: MetricsFile | None, saver: Saver | None
    ) -> bool:
        """Finish the step of the checkpoint that the run resumes from, if a kill or a signal came before its end.

        Returns:
            False after a signal, as `_finish_step`.
        """
        row = self.progress.row  # empty for a new run, and in checkpoints of older versions
        last = self.world.from_writer(lambda: metrics_file.last if metrics_file else {}) if row else {}
        if not row or last.get("step") == row["step"]:
            self._follow_best(last)
            self._keep_best(last, saver)
            if self.done:
                self.observer.note(f"{self.run_folder} is complete; raise train.tokens to train it further")
            elif self.stopped_early:
                self.observer.note(
                    f"{self.run_folder} stopped early: no validation since step {self.best.step} was better; "
                    "raise train.patience, or set it to null, to train it further"
                )
            return True
        self.step_began = row["tokens"] - row["batch_tokens"]
        self.last_loss = row["loss"] if math.isfinite(row["loss"]) else None
        return self._finish_step(stop, metrics_file, saver)

    def _finish_step(self, stop: threading.Event, metrics_file: MetricsFile | None, saver: Saver | None) -> bool:
        """Do what is due after an update and write the step's metrics; return False if a signal came before."""
        found = self._evaluate(stop)
        if found is None:
            return False
        self._keep_best(found, saver)
        metrics = self.progress.row | found
        if self.stopped_early:
            metrics["stopped_early"] = True
        if metrics_file:
            metrics_file.write(metrics)
        self.observer.step(metrics)
        if note := self.slow_steps.judge(metrics):
            self.observer.note(note)
        return True

    def _step(self, stop: threading.Event) -> bool:
        """Take one optimizer step on one global batch; return False after a signal, without a step."""
        started, waited = time.perf_counter(), self.gradients.seconds_waited
        recipe, before = self.recipe, self.progress
        sequences = self.setup.batches.sequences(before.tokens)
        batch_tokens = sequences * recipe.seq_len
        weight = mtp_weight(recipe, before.tokens, batch_tokens, self.total_tokens)
        if (outcome := self.gradients(before.samples, sequences, stop, weight)) is None:
            return False
        verdict = judge(before.spikes, outcome.loss, outcome.norm, recipe.train)
        if verdict.diverged:
            raise _DivergenceError(before.step + 1, outcome)
        settings = step_settings(recipe, before.tokens, batch_tokens, self.total_tokens)
        set_step(self.optimizer, settings)
        if not verdict.skip:
            self.optimizer.step()
            if outcome.load_LE is not None and (rate := recipe.router_training.bias_update_rate):
                move_selection_biases(self.model, outcome.load_LE, rate)
        if self.average is not None:
            self.average.update(before.tokens + batch_tokens, batch_tokens)
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.step_began = before.tokens
        self.progress = Progress(
            before.step + 1,
            before.tokens + batch_tokens,
            before.samples + sequences,
            before.seconds + seconds,
            verdict.history,
            loss_scale=self.gradients.loss_scale.state,
            best=self.best,
            averaged_from=before.averaged_from,
        )
        self.last_loss = outcome.loss if math.isfinite(outcome.loss) else self.last_loss
        if verdict.history.in_a_row == 1:
            done = "; the step is skipped" if verdict.skip else ""
            self.observer.note(f"spike at step {self.progress.step}: {verdict.reason}{done}")
        metrics: dict[str, Any] = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": outcome.loss,
            **learning_rates(self.optimizer),
            **scheduled_metrics(recipe, settings),
            "batch_tokens": batch_tokens,
            "grad_norm": outcome.norm,
            "tokens_per_second": batch_tokens / seconds,
            "seconds": self.progress.seconds,
            "step_seconds": seconds,
            "data_seconds": self.gradients.seconds_waited - waited,
        }
        metrics |= self._further_metrics(outcome, weight)
        if self.setup.dtype != torch.float32 and (peak := peak_flops(self.setup.device)):
            metrics["mfu"] = self.flops_per_token / (peak * self.world.size) * metrics["tokens_per_second"]
        metrics |= load_metrics(self.model, self.progress.step, batch_tokens, outcome.loads)
        spike = {"spike": bool(verdict.reason), "skipped": verdict.skip}
        metrics |= {key: True for key, value in spike.items() if value}
        self.progress = replace(self.progress, row=metrics)
        return True

    def _further_metrics(self, outcome: BatchOutcome, weight: float) -> dict[str, Any]:
        """Return the metrics that only some recipes or machines have; `weight` is that of the loss of `train.mtp`."""
        metrics: dict[str, Any] = {}
        if outcome.z_loss is not None:
            metrics["z_loss"] = outcome.z_loss
        if outcome.kl_loss is not None:
            metrics["kl_loss"] = outcome.kl_loss
        if outcome.mtp_loss is not None:
            metrics |= {"mtp_loss": outcome.mtp_loss, "mtp_weight": weight}
        if self.setup.loader.packings:
            metrics["trained_tokens"] = outcome.trained
        if self.data.mixed:
            metrics |= {f"tokens/{part['name']}": part["tokens"] for part in self.setup.sources(self.progress.samples)}
        if self.gradients.loss_scale.active:
            metrics |= {"loss_scale": self.progress.loss_scale.scale, "overflows": self.progress.loss_scale.retries}
        if (memory := peak_memory(self.setup.device)) is not None:
            metrics["memory"] = memory
        return metrics

    def _divergence(self, step: int, outcome: BatchOutcome) -> TrainingDivergedError:
        saved = checkpoint.checkpoints(self.run_folder)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved yet"
        return TrainingDivergedError(
            f"training diverged at step {step}: loss {outcome.loss}, gradient norm {outcome.norm}; {kept}. "
            f"Try a lower optimizer.lr (now {self.recipe.optimizer.lr:g}), a longer schedule.warmup, "
            "or train.dtype=float32"
        )

    def _evaluate(self, stop: threading.Event) -> dict[str, float] | None:
        """Do the evaluations that are due after this step: samples, validation loss, and scores of `eval.tasks`.

        With `train.ema` they are those of the average; the last weights only get a validation loss of their own.

        Returns:
            Their metrics, or None if a signal came before the end.
        """
        with self.average.in_place() if self.average else contextlib.nullcontext():
            metrics = self._evaluate_weights(stop)
        if metrics is None or self.average is None or "val_loss" not in metrics:
            return metrics
        raw = self.evaluations.losses(stop, "validating the last weights")
        return None if raw is None else metrics | {"val_loss_raw": raw["val_loss"]}

    def _evaluate_weights(self, stop: threading.Event) -> dict[str, float] | None:
        metrics: dict[str, float] = {}
        if self.done or self._due(self.recipe.eval.every):
            self.evaluations.samples(stop, self.progress.step)
            if (losses := self.evaluations.losses(stop)) is None:
                return None
            self.last_validation = losses or self.last_validation
            self._follow_best(losses)
            metrics |= losses
        if self._scores_are_due():
            if (scores := self.evaluations.scores(stop, self.progress.step)) is None:
                return None
            metrics |= scores
        return metrics

    def _follow_best(self, metrics: dict[str, Any]) -> None:
        """Compare the last step's validation loss, if it has one, with the best before it."""
        if "val_loss" in metrics:
            # One process decides for all whether the run ends.
            best, step = self.progress.best, self.progress.step
            self.best = self.world.from_writer(lambda: best.after(step, metrics["val_loss"]))

    def _keep_best(self, metrics: dict[str, Any], saver: Saver | None) -> None:
        """Save the last step if its validation loss is the best so far."""
        if self.recipe.checkpoint.keep_best and "val_loss" in metrics and self.best.step == self.progress.step:
            self._save(saver, wait=False, best=True)

    def _save(self, saver: Saver | None, *, wait: bool, best: bool = False) -> None:
        """Save the last completed step. All processes gather a sharded run; one of them writes."""
        self.saved_at = time.monotonic()
        if saver is None and not self.loss.sharded:
            return
        with self.observer.during("saving a checkpoint"):
            weights, raw = self.loss.whole_model().state_dict(), None
            if self.average is not None:
                weights, raw = self.average.state(), weights
            state = pack(
                self.progress, named_state(self.model, self.optimizer), self.data, self.recipe, self.setup.teacher
            )
            if saver is not None:
                milestone = self._due(self.recipe.checkpoint.keep_every)
                saver.save(self.progress.step, weights, state, raw, milestone=milestone, best=best, wait=wait)
