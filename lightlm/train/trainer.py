"""The training loop: one process, one device.

Batches and learning rates are functions of the step, so a run that stops between any two micro-batches and
resumes from its checkpoint repeats an uninterrupted run exactly.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lightlm import checkpoint, files
from lightlm.data.loader import BatchLoader
from lightlm.data.shards import DataFolder, resolve_dataset
from lightlm.device import autocast, describe, peak_flops, pick_device, pick_dtype
from lightlm.errors import DataError, LightLMError, RecipeError
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe
from lightlm.train.batches import batch_plan, micro_batches
from lightlm.train.checkpoint import Progress, pack, unpack
from lightlm.train.evaluation import preserved
from lightlm.train.loss import token_loss
from lightlm.train.metrics import peak_memory, step_metrics
from lightlm.train.optimizers import (
    build_optimizer,
    learning_rates,
    load_named_state,
    named_state,
    set_learning_rate,
)
from lightlm.train.saving import Saver, tidy
from lightlm.train.schedules import learning_rate_factor
from lightlm.train.spikes import Verdict, judge
from lightlm.train.tracking import MetricsFile, Observer
from lightlm.train.validation import Validation, validate

# Tokens of an automatic micro-batch. On a CPU, activations should stay near its caches; on an accelerator,
# products should be large, as far as memory goes.
_MICRO_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 32_768}
_MEMORY_SHARE = 0.6  # of free device memory that activations may take

Sampler = Callable[[Transformer, str], str]
Evaluator = Callable[[Transformer, Path], dict[str, float]]


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


def micro_batch_size(recipe: Recipe, device: torch.device) -> int:
    """Sequences a forward pass: as the recipe says, or the largest divisor of the batch within the device's budget."""
    if recipe.train.micro_batch != "auto":
        return recipe.train.micro_batch
    tokens = _MICRO_TOKENS[device.type]
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        tokens = min(tokens, int(free * _MEMORY_SHARE) // activation_bytes(recipe.model))
    most = max(tokens // recipe.seq_len, 1)
    return max(
        size for size in range(1, recipe.batch_sequences + 1) if recipe.batch_sequences % size == 0 and size <= most
    )


def activation_bytes(config: ModelConfig) -> int:
    """About what autograd keeps of one token in mixed precision, rounded up.

    benchmarks/activations.py, a layer without compile: 38 KB for `lightlm` (this gives 43), 32 KB for `gpt2-124m`
    (this gives 74).
    """
    config = config.resolved()
    return config.depth * (32 * config.hidden_size + 16 * config.intermediate_size)


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


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts at once. Only the main thread may listen."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """A run in progress.

    Args:
        recipe: what to train; its model's vocabulary may come from the data.
        run: the run folder, which exists.
        observer: told of every step, sample and checkpoint.
        sampler: continues a prompt with the model, for the samples during training.
        resume_from: the newest whole checkpoint of this run, to go on from (`runs.reopen_run`).
        evaluator: scores the model on the recipe's `eval.tasks`, as `task/metric`; the path is that of the step's
            checkpoint, which need not exist.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        observer: Observer,
        sampler: Sampler,
        resume_from: Path | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.run_folder, self.observer, self.sampler, self.evaluator = run, observer, sampler, evaluator
        self.data = DataFolder.open(resolve_dataset(recipe.data.dataset))
        self.recipe = recipe = fit_recipe(recipe, self.data, observer)
        check_prompts(recipe, self.data)
        self.device = pick_device(recipe.train.device)
        self.dtype = pick_dtype(recipe.train.dtype, self.device)
        self.micro_batch = micro_batch_size(recipe, self.device)
        self.accumulation = recipe.batch_sequences // self.micro_batch
        self.progress = Progress()
        self.resumed_from = resume_from
        torch.manual_seed(recipe.train.seed)
        if resume_from is None:
            self.model = Transformer(recipe.model).to(self.device)
        else:
            self.model = checkpoint.load_model(resume_from, self.device).model
        self.model.train()
        self.optimizer = build_optimizer(self.model, recipe.optimizer, self.dtype)
        if resume_from is not None:
            self.progress, optimizer_state = unpack(resume_from, self.data)
            load_named_state(self.model, self.optimizer, optimizer_state)
        self.step_began = self.progress.tokens  # of the last step
        self.plan = batch_plan(recipe)
        steps_left, self.total_tokens = self.plan.remaining(self.progress.tokens)
        self.total_steps = self.progress.step + steps_left
        self.loader = BatchLoader(
            self.data.split("train"), recipe.seq_len, recipe.train.seed, samples_seen=self.progress.samples
        )
        self.token_bytes = torch.from_numpy(self.data.tokenizer.token_bytes())
        self.loss_function = self._compiled(token_loss)
        self.flops_per_token = self.model.flops_per_token(recipe.seq_len)
        if not len(self.data.split("val")):
            observer.note(f"{self.data.path} has no validation split: there will be no validation loss")
        self.last_validation: Validation | None = None
        self.last_loss: float | None = None

    def _compiled(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        wanted = self.recipe.train.compile
        if wanted is True or (wanted == "auto" and self.device.type == "cuda"):
            return torch.compile(function)
        return function

    def facts(self) -> dict[str, Any]:
        """What the run is, for the display and for --dry-run."""
        recipe = self.recipe
        return {
            "name": recipe.name,
            "run": str(self.run_folder),
            "parameters": self.model.num_parameters()["total"],
            "device": describe(self.device),
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
            "epochs": self.total_tokens / recipe.seq_len / self.loader.num_samples,
        }

    def train(self) -> Result:
        """Run to the end of the recipe, or until Ctrl-C or SIGTERM; either way the last step is saved.

        Raises:
            TrainingDivergedError: a loss or gradient is NaN or infinite, and with `train.skip_spikes` so were those
                of the steps before it; the last checkpoint stays as it was.
        """
        files.write_text(self.run_folder / "recipe.yaml", self.recipe.to_yaml())
        checkpoint.mark_latest(self.run_folder)
        tidy(self.run_folder, self.resumed_from, self.observer)
        metrics_file = MetricsFile(self.run_folder / "metrics.jsonl", self.progress.step)
        self.observer.start(self.facts() | {"logged_step": metrics_file.logged_step})
        settings = self.recipe.checkpoint
        try:
            with self._saver() as saver, stop_on_signals() as stop:
                while not self.done and not stop.is_set():
                    metrics = self._step(stop)
                    if metrics is None:
                        break
                    if self.done or self._due(self.recipe.eval.every):
                        metrics |= self._validate()
                    if self.evaluator is not None and (self.done or self._due(self.recipe.eval.tasks_every)):
                        metrics |= self._score_tasks(self.evaluator)
                    metrics_file.write(metrics)
                    self.observer.step(metrics)
                    saver.report()
                    if self.done or self._due(settings.every) or self._due(settings.keep_every):
                        self._save(saver, wait=self.done)
                interrupted = not self.done
                if interrupted:
                    self._save(saver, wait=True)
        finally:
            metrics_file.close()
        return self._result(interrupted)

    @property
    def done(self) -> bool:
        """Whether the run has all its tokens."""
        return self.progress.tokens >= self.recipe.train.tokens

    def _due(self, every: int) -> bool:
        """Whether the last step crossed a multiple of `every` tokens."""
        return every > 0 and self.progress.tokens // every > self.step_began // every

    def _gradients(self, stop: threading.Event, sequences: int) -> tuple[float, float] | None:
        """Accumulate the gradients of a global batch of `sequences`, clipped: its mean loss and gradient norm.

        A signal in between drops them and gives None, so that nothing of the step has happened.
        """
        tokens = sequences * self.recipe.seq_len
        loss_sum = torch.zeros((), device=self.device)
        for count in micro_batches(sequences, self.micro_batch):
            if stop.is_set():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            inputs, targets = self.loader.next_batch(count)
            with autocast(self.device, self.dtype):
                loss = self.loss_function(self.model, inputs.to(self.device), targets.to(self.device))
            (loss / tokens).backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.train.grad_clip or math.inf)
        return loss_sum.item() / tokens, norm.item()

    def _step(self, stop: threading.Event) -> dict[str, Any] | None:
        """One optimizer step on one global batch: its metrics, or None if a signal came first."""
        started, waited = time.perf_counter(), self.loader.seconds_waited
        recipe, before = self.recipe, self.progress
        sequences = self.plan.sequences(before.tokens)
        batch_tokens = sequences * recipe.seq_len
        if (outcome := self._gradients(stop, sequences)) is None:
            return None
        loss, norm = outcome
        verdict = judge(before.spikes, loss, norm, recipe.train)
        if verdict.diverged:
            self._diverged(before.step + 1, loss, norm)
        middle = before.tokens + batch_tokens // 2
        set_learning_rate(self.optimizer, learning_rate_factor(recipe.schedule, middle, self.total_tokens))
        if not verdict.skip:
            self.optimizer.step()
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
        self.last_loss = loss if math.isfinite(loss) else self.last_loss
        peak = peak_flops(self.device) if self.dtype != torch.float32 else None
        metrics = step_metrics(
            self.progress,
            batch_tokens=batch_tokens,
            loss=loss,
            rates=learning_rates(self.optimizer),
            grad_norm=norm,
            step_seconds=seconds,
            data_seconds=self.loader.seconds_waited - waited,
            memory=peak_memory(self.device),
            utilisation_per_token=self.flops_per_token / peak if peak else None,
        )
        return metrics | self._spike_metrics(verdict)

    def _spike_metrics(self, verdict: Verdict) -> dict[str, bool]:
        """What metrics.jsonl says of a spike; the first of several in a row is also noted."""
        if not verdict.spike:
            return {}
        if verdict.history.in_a_row == 1:
            done = "; the step is skipped" if verdict.skip else ""
            self.observer.note(f"spike at step {self.progress.step}: {verdict.reason}{done}")
        return {"spike": True} | ({"skipped": True} if verdict.skip else {})

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
            self.model,
            self.data.split("val"),
            self.token_bytes,
            seq_len=recipe.seq_len,
            max_tokens=recipe.eval.tokens,
            batch_size=self.micro_batch,
            dtype=self.dtype,
        )
        return {"val_loss": result.loss, "val_bpb": result.bits_per_byte}

    def _score_tasks(self, evaluator: Evaluator) -> dict[str, float]:
        """The scores of `eval.tasks`; a task that fails, by whatever error, is noted and costs no training."""
        path = self.run_folder / "checkpoints" / checkpoint.step_name(self.progress.step)
        try:
            with preserved(self.model):
                scores = evaluator(self.model, path)
        except Exception as error:
            self.observer.note(f"eval.tasks could not be scored at step {self.progress.step}: {error}")
            return {}
        return {f"eval/{name}": value for name, value in scores.items()}

    def _sample(self) -> None:
        """Let the model continue the recipe's prompts."""
        if not self.recipe.eval.prompts:
            return
        samples = self.run_folder / "samples" / f"{checkpoint.step_name(self.progress.step)}.txt"
        samples.parent.mkdir(exist_ok=True)
        texts = []
        for prompt in self.recipe.eval.prompts:
            text = self.sampler(self.model, prompt)
            texts.append(prompt + text)
            self.observer.sample(self.progress.step, prompt, text)
        files.write_text(samples, "\n\n---\n\n".join(texts) + "\n")

    def _saver(self) -> Saver:
        return Saver(self.run_folder, self.recipe.checkpoint, self.data.tokenizer, self.model.config, self.observer)

    def _save(self, saver: Saver, *, wait: bool) -> None:
        """Save the last completed step."""
        state = pack(self.progress, named_state(self.model, self.optimizer), self.data)
        milestone = self._due(self.recipe.checkpoint.keep_every)
        saver.save(self.progress.step, self.model.state_dict(), state, milestone=milestone, wait=wait)

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
