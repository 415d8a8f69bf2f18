"""Gradients of a global batch: this process's part of it, in micro-batches that fit the device's memory."""

import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightlm.data.loader import BatchLoader
from lightlm.device import autocast, release_memory
from lightlm.errors import LightLMError, RecipeError, is_out_of_memory
from lightlm.limits import memory
from lightlm.model.counting import count_parameters
from lightlm.model.fused import kept_weight_copies
from lightlm.recipe import Recipe
from lightlm.sharding import whole
from lightlm.train.schedules import BatchPlan
from lightlm.train.step.activations import activation_bytes
from lightlm.train.step.divergence import TopTokens
from lightlm.train.step.parallel import MicroBatch, ParallelLoss, PassLoss
from lightlm.train.step.scaling import LossScale

# Tokens per automatic micro-batch. On a CPU, activations should stay near its caches; on an accelerator, products
# should be as large as memory allows.
_MICRO_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 32_768}
_MEMORY_SHARE = 0.6  # of a GPU's free memory, or of a machine's, that activations may take
_STATE_BYTES = 28  # per parameter on a CPU: weight, gradient, two moments, and a copy of all but the gradient to save

# Of this process: sums of its losses, with multi-token prediction also of that loss and of its targets; and tokens per
# expert and layer.
_Sums = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class BatchOutcome:
    """Results of a global batch, the same in all processes."""

    loss: float  # mean nats per token that is trained on
    norm: float  # norm of the whole gradient, before clipping
    load_LE: Tensor | None = None  # int64, on the device: tokens per expert and layer
    loads: list[list[int]] | None = None  # the same, on the host
    z_loss: float | None = None  # mean of logsumexp(logits)^2, with `train.z_loss`
    kl_loss: float | None = None  # mean divergence from the teacher, times T^2, with `train.distill`
    trained: int = 0  # targets that are trained on: all of text, the assistant's of conversations
    mtp_loss: float | None = None  # mean nats per token of multi-token prediction, with `train.mtp`


def check_shares(recipe: Recipe, plan: BatchPlan, processes: int) -> None:
    """Check that the processes can share the global batch equally.

    Raises:
        RecipeError: they cannot; the message lists the numbers of processes that can.
    """
    sequences = plan.sequences(0)  # later ones are multiples of the first
    if sequences % processes:
        key = "train.batch_tokens" if sequences == recipe.batch_sequences else "schedule.batch_start"
        raise RecipeError(
            f"{processes} processes cannot share the {sequences} sequences of a global batch equally; "
            f"start one of {', '.join(map(str, _divisors(sequences)))} processes, "
            f"or make {key} (now {sequences * recipe.seq_len}) a multiple of {processes * recipe.seq_len}"
        )


def micro_batch_size(
    recipe: Recipe,
    device: torch.device,
    processes: int = 1,
    free: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Return the sequences per forward pass: the recipe's, or the largest divisor of a process's share that fits.

    Args:
        free: free bytes of the device's memory for activations; asked of the device unless given.
        dtype: precision of matrix products.
    """
    share = recipe.batch_sequences // processes
    if recipe.train.micro_batch_size != "auto":
        return min(recipe.train.micro_batch_size, share)
    tokens = _MICRO_TOKENS[device.type]
    if free is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _host_memory(recipe, processes)
    per_token = activation_bytes(  # an upper bound
        recipe.model,
        mixed=dtype != torch.float32,
        fused=device.type == "cpu",
        recompute=recipe.train.activation_checkpointing,
        dropout=recipe.train.dropout > 0,
        mtp_depth=recipe.train.mtp.depth,
    )
    tokens = min(tokens, int(free * _MEMORY_SHARE) // per_token)
    most = max(tokens // recipe.seq_len, 1)
    return max(size for size in _divisors(share) if size <= most)


def _host_memory(recipe: Recipe, processes: int) -> int:
    """Return the bytes that each process of this machine has beside the state of training.

    All memory counts, not what is free now: a resumed run and the seeds of a sweep must get the same micro-batch.
    """
    here = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    return max(memory() // here - _STATE_BYTES * count_parameters(recipe.model)["total"], 0)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


class Gradients:
    """Accumulates a global batch's gradients.

    Args:
        loader: source of batches by sample number, so that the order does not depend on processes, signals or retries.
        micro_batch: sequences per pass; it shrinks to what fits with `train.micro_batch_size=auto`.
        note: receives a message when the micro-batch shrinks.
        loss_scale: with float16, scales the loss, and decides whether a batch is computed again.
    """

    def __init__(
        self,
        loss: ParallelLoss,
        loader: BatchLoader,
        recipe: Recipe,
        micro_batch: int,
        note: Callable[[str], None],
        loss_scale: LossScale,
    ) -> None:
        self.loss_scale = loss_scale
        self.micro_batch, self._adjustable = micro_batch, recipe.train.micro_batch_size == "auto"
        self._clip = recipe.train.grad_clip or math.inf
        self._with_dropout = recipe.train.dropout > 0
        given = {"loss": True, "z_loss": recipe.train.z_loss > 0, "kl_loss": recipe.train.distill is not None}
        self._losses = [name for name, there in given.items() if there]
        self._loss, self._loader, self._note = loss, loader, note
        self._mtp_weight: Tensor | None = None  # in the present batch
        self._world, self._device, self._dtype = loss.world, loss.device, loss.dtype
        self._parameters = [parameter for parameter in loss.model.parameters() if parameter.requires_grad]
        self.seconds_waited = 0.0  # seconds spent waiting for batches, over all steps
        self._ahead: tuple[tuple[int, int], MicroBatch] | None = None
        self._warm = not loss.replicated

    def __call__(self, first: int, count: int, stop: threading.Event, mtp_weight: float = 0.0) -> BatchOutcome | None:
        """Compute the clipped gradients of samples `first` to `first + count` of the run.

        They are the mean over the batch's trained tokens, whatever the number of processes. After a signal to any
        process before the last micro-batch, all processes drop them and return None.

        Args:
            mtp_weight: the weight of multi-token prediction, for a model that has it.

        Raises:
            LightLMError: a micro-batch does not fit into memory and cannot shrink.
        """
        if self._loss.model.mtp:
            self._mtp_weight = torch.full((), mtp_weight, device=self._device)
        if not self._warm:
            self._warm_up(first, count)
        while True:
            outcome = self._attempt(first, count, stop)
            if outcome is None or self.loss_scale.accept(finite=math.isfinite(outcome.norm)):
                return outcome
            self._loss.model.zero_grad()

    def _attempt(self, first: int, count: int, stop: threading.Event) -> BatchOutcome | None:
        """Compute a batch once, as `__call__`; the gradients of float16 may have overflowed."""
        while True:
            # A sharded run frees its weights after each pass.
            with contextlib.nullcontext() if self._loss.sharded else kept_weight_copies():
                sums, stopped = self._accumulate(first, count, stop)
            if sums is not None:
                break
            self._loss.model.zero_grad()
            if stopped:
                return None
            self._shrink()
        self.loss_scale.unscale(self._parameters)
        norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip))
        totals, load_LE = sums
        if self._world.size > 1:
            totals = self._world.sum(totals.double())
        # The step's one wait for the device. Loads are below 2**24, so fp32 holds them exactly.
        numbers = torch.cat([norm.to(totals.dtype)[None], totals])
        if load_LE is not None:
            numbers = torch.cat([numbers, self._world.sum(load_LE).flatten().to(totals.dtype)])
        norm_value, *flat = numbers.tolist()
        trained = self._loader.trained(first, count)
        of_totals, of_loads = flat[: len(totals)], flat[len(totals) :]
        means = {name: total / max(trained, 1) for name, total in zip(self._losses, of_totals, strict=False)}
        if self._mtp_weight is not None:
            total, targets = of_totals[-2:]
            means["mtp_loss"] = total / max(targets, 1)
        loads = None if load_LE is None else torch.tensor(of_loads).long().view(load_LE.shape).tolist()
        return BatchOutcome(norm=norm_value, load_LE=load_LE, loads=loads, trained=trained, **means)

    def passes(self, count: int) -> int:
        """Return the micro-batches per process of a global batch of `count` sequences."""
        return -(-count // (self._world.size * self.micro_batch))

    def _parts(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return (start, count) of this process's micro-batches: as many as in any other, of nearly equal sizes."""
        world, passes = self._world, self.passes(count)
        begin, end = (first + count * rank // world.size for rank in (world.rank, world.rank + 1))
        bounds = [begin + (end - begin) * index // passes for index in range(passes + 1)]
        return [(start, stop - start) for start, stop in itertools.pairwise(bounds)]

    def _accumulate(self, first: int, count: int, stop: threading.Event) -> tuple[_Sums | None, bool]:
        """Return (this process's sums, False), (None, True) after a signal, or (None, False) without memory."""
        parts, full = self._parts(first, count), False
        trained = self._loader.trained(first, count)
        number = len(self._losses) + (0 if self._mtp_weight is None else 2)
        totals, load_LE = torch.zeros(number, device=self._device), None
        for index, (start, size) in enumerate(parts):
            # Before each pass, all processes agree whether to continue, so that none waits for another's gradients.
            stopped, full = self._world.any(stop.is_set() or self._world.abandoned, full)
            if stopped or full:
                return None, stopped
            last = index == len(parts) - 1
            losses = self._pass(start, size, count, trained, last=last)
            if losses is None:
                full = True
                continue
            mtp = () if losses.mtp_2 is None else losses.mtp_2.unbind()
            found = (losses.loss.detach(), losses.z, losses.kl, *mtp)
            totals += torch.stack([part for part in found if part is not None])
            if losses.load_LE is not None:
                load_LE = losses.load_LE if load_LE is None else load_LE + losses.load_LE
            if self._device.type == "cuda":  # read the next micro-batch while the GPU computes
                following = (parts[0][0] + count, parts[0][1]) if last else parts[index + 1]
                self._ahead = following, self._load(*following)
        return (None if full else (totals, load_LE)), False

    def _pass(self, start: int, size: int, count: int, trained: int, *, last: bool) -> PassLoss | None:
        """Run samples `start` to `start + size` forward and backward; return their losses, or None without memory.

        Args:
            count, trained: samples and trained targets of the global batch.
        """
        try:
            batch = self._batch(start, size)._replace(mtp_weight=self._mtp_weight)
            if batch.starts_BT is not None:  # conversations
                share = torch.full((), trained / (count * self._loader.seq_len), device=self._device)
                batch = batch._replace(trained_share=share)
            with self._loss.synchronized(last):
                with autocast(self._device, self._dtype):
                    losses = self._loss(batch)
                # The processes' gradients are averaged, so each is divided by its own share of the tokens.
                mean = losses.objective / (max(trained, 1) / self._world.size)
                self.loss_scale(mean).backward()
            return losses
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self._loss.communicates(last):
                # The other processes already wait for this one's gradients.
                raise self._too_large() from error
        return None

    def _batch(self, start: int, size: int) -> MicroBatch:
        if self._ahead is not None and self._ahead[0] == (start, size):
            return self._ahead[1]
        started = time.perf_counter()
        batch = self._load(start, size)
        self.seconds_waited += time.perf_counter() - started
        return batch

    def _load(self, start: int, size: int) -> MicroBatch:
        """Return samples on the device; to CUDA from pinned memory, asynchronously."""
        inputs, targets, *starts = self._loader.batch(start, size)
        samples = torch.arange(start, start + size) if self._with_dropout else None
        taught = None
        if self._loader.taught:
            records = self._loader.top_tokens(start, size)
            taught = TopTokens(*(self._moved(torch.from_numpy(part)) for part in records))
        starts_BT = self._moved(starts[0] if starts else None)
        return MicroBatch(self._moved(inputs), self._moved(targets), self._moved(samples), starts_BT, taught=taught)

    def _moved(self, tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if self._device.type != "cuda":  # a copy to MPS that does not wait reads memory that is freed by then
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _warm_up(self, first: int, count: int) -> None:
        """Run passes whose gradients are dropped, before the first step of a process.

        DistributedDataParallel rebuilds its buckets after its first backward pass, and the place in a bucket decides
        the order in which more than two processes sum a gradient. Without this, the first step after resuming would
        round differently. It also finds a micro-batch that fits while no process waits for another.
        """
        trained = self._loader.trained(first, count)
        while True:
            start, size = self._parts(first, count)[0]
            failed = self._pass(start, size, count, trained, last=False) is None
            self._loss.model.zero_grad()
            if not self._world.any(failed)[0]:
                break
            self._shrink()
        self._pass(start, size, count, trained, last=True)
        self._loss.model.zero_grad()
        self._warm = True

    def _shrink(self) -> None:
        """Reduce the micro-batch to at most half, in all processes."""
        if not self._adjustable or self.micro_batch == 1:
            raise self._too_large()
        # A divisor of the micro-batch keeps all passes of one size.
        smaller = max(size for size in _divisors(self.micro_batch) if size <= self.micro_batch // 2)
        self._note(
            f"a micro-batch of {self.micro_batch} sequences does not fit into the device's memory: continuing with "
            f"{smaller}; set train.micro_batch_size={smaller} to start there"
        )
        self.micro_batch = smaller
        release_memory(self._device)

    def _too_large(self) -> LightLMError:
        smaller = f"train.micro_batch_size to {self.micro_batch // 2} or less (the global batch stays the same)"
        return LightLMError(
            f"the device is out of memory: train.micro_batch_size, {self.micro_batch} sequences of "
            f"{self._loader.seq_len} tokens, does not fit; "
            + (f"set {smaller}" if self.micro_batch > 1 else "lower train.seq_len or the model's size")
        )
