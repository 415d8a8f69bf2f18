"""Validation loss and bits per byte on a fixed part of the validation split."""

import math
from dataclasses import dataclass

import torch

from lightlm.data.loader import validation_batches
from lightlm.data.shards import TokenStream
from lightlm.device import autocast
from lightlm.model.transformer import Transformer
from lightlm.train.loss import token_loss


@dataclass(frozen=True)
class Validation:
    """Results over the same windows every time."""

    loss: float  # mean nats a token
    bits_per_byte: float  # comparable between tokenizers
    tokens: int


@torch.no_grad()
def validate(
    model: Transformer,
    stream: TokenStream,
    token_bytes: torch.Tensor,
    *,
    seq_len: int,
    max_tokens: int,
    batch_size: int,
    dtype: torch.dtype,
) -> Validation:
    """Loss over the first `max_tokens` of a validation stream in windows of `seq_len`.

    Args:
        token_bytes: UTF-8 bytes that each token id stands for, int tensor (V,); special tokens count 0.
    """
    device = model.device
    nats, tokens, num_bytes = 0.0, 0, 0
    model.eval()
    for inputs, targets in validation_batches(stream, seq_len, max_tokens, batch_size):
        with autocast(device, dtype):
            nats += token_loss(model, inputs.to(device), targets.to(device)).item()
        tokens += targets.numel()
        num_bytes += int(token_bytes[targets].sum())
    model.train()
    return Validation(nats / tokens, nats / math.log(2) / max(num_bytes, 1), tokens)
