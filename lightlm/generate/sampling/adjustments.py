"""Changes to one row's logits before the temperature divides them: bias, penalties and bans.

Each function changes `logits_V` in place. Token ids outside it are ignored.

Shapes: V vocabulary.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from lightlm.generate.sampling.settings import Sampling


def adjust(
    logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], new: Sequence[int], stop_ids: Collection[int]
) -> None:
    """Apply the settings of `sampling` that depend on what the row holds, in the order that `Sampling` gives."""
    if sampling.logit_bias:
        add_bias(logits_V, sampling.logit_bias)
    if sampling.repetition_penalty != 1:
        penalize_repetition(logits_V, [*prompt, *new], sampling.repetition_penalty)
    if sampling.frequency_penalty != 0 or sampling.presence_penalty != 0:
        penalize_counts(logits_V, new, sampling.frequency_penalty, sampling.presence_penalty)
    if sampling.no_repeat_ngram:
        ban(logits_V, repeating_tokens([*prompt, *new], sampling.no_repeat_ngram))
    if len(new) < sampling.min_new_tokens:
        ban(logits_V, stop_ids)


def add_bias(logits_V: Tensor, biases: Sequence[tuple[int, float]]) -> None:
    """Add each pair's bias to the logit of its id."""
    for token, bias in biases:
        if token < len(logits_V):
            logits_V[token] += bias


def penalize_repetition(logits_V: Tensor, ids: Sequence[int], penalty: float) -> None:
    """Divide the positive logits of these ids by `penalty` and multiply the negative ones (arXiv 1909.05858)."""
    index = _index(set(ids), len(logits_V))
    chosen = logits_V[index]
    logits_V[index] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)


def penalize_counts(logits_V: Tensor, new: Sequence[int], frequency: float, presence: float) -> None:
    """Subtract `frequency` for each occurrence of an id in the answer, and `presence` once (OpenAI's API)."""
    ids, counts = np.unique(np.asarray(new, dtype=np.int64), return_counts=True)
    known = ids < len(logits_V)
    logits_V[torch.from_numpy(ids[known])] -= torch.from_numpy(frequency * counts[known] + presence).to(logits_V.dtype)


def repeating_tokens(ids: Sequence[int], size: int) -> list[int]:
    """Return the tokens that, after these ids, would end a sequence of `size` tokens that they already contain."""
    if len(ids) < size:
        return []
    array = np.asarray(ids, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(array, size)
    same = (windows[:, :-1] == array[len(array) - size + 1 :]).all(axis=1)
    repeating: list[int] = windows[same, -1].tolist()
    return repeating


def ban(logits_V: Tensor, ids: Collection[int]) -> None:
    """Set the logits of these ids to minus infinity, unless no token would be left."""
    index = _index(ids, len(logits_V))
    kept = logits_V[index]
    logits_V[index] = -torch.inf
    if not torch.isfinite(logits_V.max()):
        logits_V[index] = kept


def _index(ids: Collection[int], size: int) -> Tensor:
    return torch.tensor([token for token in ids if token < size], dtype=torch.long)
