"""The unigram baseline: how well token frequencies alone, without any model, predict the validation split."""

import math

import numpy as np

from lightlm.data.shards import DataFolder, TokenStream, UnigramEntropy

_BLOCK = 1 << 22  # tokens counted at a time: 32 MB as int64


def unigram_entropy(data_folder: DataFolder) -> tuple[float, float]:
    """(nats per token, bits per byte) of the validation tokens under the train split's token frequencies.

    A model whose validation loss is not below the first figure has learned nothing from context.
    Raises ValueError where the validation split is empty.
    """
    manifest = data_folder.manifest
    train, val = (count_tokens(data_folder.split(split), manifest.vocab_size) for split in ("train", "val"))
    result = cross_entropy(train, val, manifest.text_bytes["val"])
    return result.nats_per_token, result.bits_per_byte


def count_tokens(stream: TokenStream, vocab_size: int) -> np.ndarray:
    """How often each id occurs in a stream: int64 of shape (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(stream), _BLOCK):
        counts += np.bincount(stream.slice(start, min(_BLOCK, len(stream) - start)), minlength=vocab_size)
    return counts


def cross_entropy(train_counts: np.ndarray, val_counts: np.ndarray, val_bytes: int) -> UnigramEntropy:
    """Cross-entropy of tokens counted in `val_counts` under add-one-smoothed `train_counts`, both (vocab_size,).

    Raises ValueError where nothing was counted in `val_counts`.
    """
    tokens = int(val_counts.sum())
    if tokens == 0 or val_bytes == 0:
        raise ValueError("the validation split is empty")
    log_probabilities = np.log(train_counts + 1.0) - math.log(int(train_counts.sum()) + len(train_counts))
    nats = -float(val_counts @ log_probabilities)
    return UnigramEntropy(nats_per_token=nats / tokens, bits_per_byte=nats / math.log(2) / val_bytes)
