"""The unigram baseline: how well token frequencies alone, without any model, predict the validation split."""

import math

import numpy as np

from lightlm.data.shards import UnigramEntropy


def cross_entropy(train_counts: np.ndarray, val_counts: np.ndarray, val_bytes: int) -> UnigramEntropy:
    """Cross-entropy of tokens counted in `val_counts` under add-one-smoothed `train_counts`, both (vocab_size,).

    A model whose validation loss is not below this has learned nothing from context.
    Raises ValueError where nothing was counted in `val_counts`.
    """
    tokens = int(val_counts.sum())
    if tokens == 0 or val_bytes == 0:
        raise ValueError("the validation split is empty")
    log_probabilities = np.log(train_counts + 1.0) - math.log(int(train_counts.sum()) + len(train_counts))
    nats = -float(val_counts @ log_probabilities)
    return UnigramEntropy(nats_per_token=nats / tokens, bits_per_byte=nats / math.log(2) / val_bytes)
