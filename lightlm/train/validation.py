"""Validation loss and bits per byte on a fixed part of the validation split."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightlm.data.loader import validation_batches
from lightlm.data.packing import TooLong
from lightlm.data.shards import TokenStream
from lightlm.device import autocast
from lightlm.train.step.parallel import ParallelLoss


@dataclass(frozen=True)
class _Sums:
    """What a validation stream adds up to."""

    nats: float
    text_nats: float  # of tokens that are text
    tokens: float
    num_bytes: float

    def metrics(self, name: str = "") -> dict[str, float]:
        per_byte = self.text_nats / math.log(2) / max(self.num_bytes, 1)
        return {f"val_loss{name}": self.nats / self.tokens, f"val_bpb{name}": per_byte}

    def per_token(self, weight: float) -> list[float]:
        return [weight * value / self.tokens for value in (self.nats, self.text_nats, self.tokens, self.num_bytes)]


def validate(
    loss: ParallelLoss,
    streams: Mapping[str, TokenStream],
    weights: Mapping[str, float],
    token_bytes: Tensor,
    *,
    seq_len: int,
    max_tokens: int,
    batch_size: int,
    stopped: Callable[[], bool],
    finished: Callable[[float], None],
    too_long: TooLong = "cut",
) -> dict[str, float] | None:
    """Return `val_loss`, in nats per token, and `val_bpb`, in bits per byte, which is comparable between tokenizers.

    They cover the first `max_tokens` of a validation stream in windows of `seq_len`; of conversations, only the tokens
    that are trained on count. The processes share the windows, which are the same at every validation. Targets that are
    special tokens, such as end-of-text, are not text: they count in `val_loss`, and not in `val_bpb`, as in the task
    heldout.

    Several streams share `max_tokens` equally. `val_loss/NAME` and `val_bpb/NAME` are theirs, and `val_loss` and
    `val_bpb` are what a text mixed by `weights` would have.

    Args:
        weights: shares of tokens by name; if those of all streams are 0, the streams count equally.
        token_bytes: UTF-8 bytes per token id, int tensor (V,); special tokens have 0.
        stopped: asked after each batch, in all processes together; once it answers yes, the result is None.
        finished: receives the finished share after each batch.
        too_long: see `BatchLoader`.
    """
    found: dict[str, _Sums] = {}
    for number, (name, stream) in enumerate(streams.items()):

        def part_finished(share: float, before: int = number) -> None:
            finished((before + share) / len(streams))

        tokens = max(max_tokens // len(streams), 1)
        sums = _validate(loss, stream, token_bytes, seq_len, tokens, batch_size, stopped, part_finished, too_long)
        if sums is None:
            return None
        found[name] = sums
    if len(weights) == 1:
        return next(iter(found.values())).metrics()
    equal = not any(weights[name] for name in found)
    mixed = [sums.per_token(1.0 if equal else weights[name]) for name, sums in found.items()]
    metrics = _Sums(*map(sum, zip(*mixed, strict=True))).metrics()
    for name, sums in found.items():
        metrics |= sums.metrics(f"/{name}")
    return metrics


@torch.no_grad()
def _validate(
    loss: ParallelLoss,
    stream: TokenStream,
    token_bytes: Tensor,
    seq_len: int,
    max_tokens: int,
    batch_size: int,
    stopped: Callable[[], bool],
    finished: Callable[[float], None],
    too_long: TooLong,
) -> _Sums | None:
    """Return the sums of one stream, or None once `stopped` answers yes."""
    model, device, world = loss.model, loss.device, loss.world
    nats, text_nats, tokens, num_bytes, seen = 0.0, 0.0, 0.0, 0.0, 0
    total = min(max_tokens, len(stream) - 1)
    batches = validation_batches(stream, seq_len, max_tokens, batch_size, too_long)
    model.eval()
    while one_each := list(itertools.islice(batches, world.size)):
        # FSDP needs equally many batches in all processes, so in the last round some repeat another's.
        counts = world.rank < len(one_each)
        inputs, targets, *starts = one_each[world.rank if counts else 0]
        with autocast(device, loss.dtype):
            losses_N = loss.evaluate(*(part.to(device) for part in (inputs, targets, *starts)))
        if counts:
            trained_N = targets.flatten() >= 0
            bytes_N = token_bytes[targets.flatten().clamp(min=0)].where(trained_N, 0)
            text_losses_N = losses_N.where((bytes_N > 0).to(device), 0.0)
            batch_nats, batch_text_nats = torch.stack([losses_N.sum(), text_losses_N.sum()]).tolist()
            nats += batch_nats
            text_nats += batch_text_nats
            tokens += int(trained_N.sum())
            num_bytes += int(bytes_N.sum())
        seen += sum(part[1].numel() for part in one_each)
        finished(min(seen / total, 1.0))
        if stopped():
            model.train()
            return None
    model.train()
    sums = torch.tensor([nats, text_nats, tokens, num_bytes], dtype=torch.float64)
    return _Sums(*world.sum(sums).tolist())
