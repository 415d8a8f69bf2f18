"""Log-likelihoods of continuations: each token that requests share is computed once, the head only where it is needed.

Shapes: B rows, T columns, D hidden size, N scored positions, P pairs of a scored position and a target, C a piece of
the vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightlm.errors import LightLMError
from lightlm.evaluate.packing import Limits, Request, Stand, Tree, plan
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.model.trees import Trees, Trunk

# Positions of a batch. More gain nothing on a CPU, and on a GPU the last percents of its speed.
_BUDGET = {"cpu": 4096, "mps": 16384, "cuda": 65536}
# Columns of the head at a time: its logits (1,024 positions: 4 MB) then stay in a CPU's caches. benchmarks/head.py
_PIECE = {"cpu": 1024}
_HEAD_ROWS = 4096


@dataclass(frozen=True)
class Score:
    """The sum of the continuation's log-probabilities (nats), and whether greedy decoding would have written it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class BatchSize:
    """Limits of one batch: `sequences` if given, else so many positions, padding included."""

    positions: int
    sequences: int | None = None

    @classmethod
    def of(cls, batch_size: int | str, device: torch.device) -> "BatchSize":
        """From a command line's `auto` or number.

        Raises:
            ValueError: it is neither.
        """
        sequences = None if str(batch_size).startswith("auto") else int(batch_size)
        if sequences is not None and sequences < 1:
            raise ValueError(batch_size)
        return cls(_BUDGET.get(device.type, _BUDGET["cpu"]), sequences)

    def fits(self, sequences: int, length: int) -> bool:
        if self.sequences is not None:
            return sequences <= self.sequences
        return sequences == 1 or sequences * length <= self.positions


@torch.no_grad()
def score(
    model: Transformer,
    requests: list[tuple[list[int], list[int]]],
    batch_size: BatchSize,
    on_done: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """Score each (context ids, continuation ids); both must have at least one token.

    A request longer than the model's context loses tokens from the left, as in lm-eval's `hf` model: of
    context + continuation the last max_seq_len + 1 tokens stay, all but the last are read, and the outputs of
    the last len(continuation) are scored.

    Args:
        on_done: told after each batch how many requests it finished.

    Raises:
        LightLMError: a continuation alone is longer than the model's context.
    """
    scores: list[Score] = [Score(0.0, True)] * len(requests)
    config = model.config
    limits = Limits(batch_size.positions, batch_size.sequences or len(requests), _attention_cost(config))
    for stand in plan(_cut(requests, config.max_seq_len), limits):
        trunk = _read_trunk(model, stand)
        for trees in _batches(stand.trees, batch_size):
            done = [request for tree in trees for request in tree.requests]
            for request, result in zip(done, _score_batch(model, trees, trunk), strict=True):
                scores[request.index] = result
            on_done(len(done))
    return scores


def _cut(requests: list[tuple[list[int], list[int]]], max_seq_len: int) -> list[Request]:
    cut = []
    for index, (context, continuation) in enumerate(requests):
        if len(continuation) > max_seq_len:
            raise LightLMError(
                f"an answer to be scored has {len(continuation):,} tokens, the model's context holds {max_seq_len:,}; "
                "this task does not fit this model"
            )
        inputs = (context + continuation)[-(max_seq_len + 1) : -1]
        cut.append(Request(index, tuple(inputs), continuation))
    return cut


def _attention_cost(config: ModelConfig) -> float:
    """See `Limits.square`."""
    return 1 / (1.5 * config.hidden_size)


def _read_trunk(model: Transformer, stand: Stand) -> Trunk | None:
    if not stand.trunk:
        return None
    cache = model.new_cache(1, len(stand.trunk))
    model.hidden_states(torch.tensor([stand.trunk], device=model.device), cache)
    return Trunk(cache)


def _batches(trees: list[Tree], batch_size: BatchSize) -> Iterator[list[Tree]]:
    batch: list[Tree] = []
    requests = 0
    for tree in trees:
        rows = len(batch) + 1 if batch_size.sequences is None else requests + len(tree.requests)
        if batch and not batch_size.fits(rows, len(batch[0])):
            yield batch
            batch, requests = [], 0
        batch.append(tree)
        requests += len(tree.requests)
    if batch:
        yield batch


def _score_batch(model: Transformer, trees: list[Tree], trunk: Trunk | None) -> Iterator[Score]:
    """Scores of all requests, tree by tree."""
    width, device = len(trees[0]), model.device
    tokens_BT = _pad([tree.tokens for tree in trees], width).to(device)
    positions_BT = _pad([tree.positions for tree in trees], width).to(device)
    ends_BT = torch.tensor([[*tree.ends, *range(len(tree) + 1, width + 1)] for tree in trees], device=device)
    x_BTD = model.hidden_states(tokens_BT, trees=Trees(positions_BT, ends_BT, trunk))
    pairs = [columns for tree in trees for columns in tree.scored]
    starts = (row * width for row, tree in enumerate(trees) for _ in tree.scored)
    places_P = np.concatenate([np.array(columns) + start for columns, start in zip(pairs, starts, strict=True)])
    # Requests may share scored positions: those of a common beginning, and the last of a question with short answers.
    places_N, rows_P = np.unique(places_P, return_inverse=True)
    targets = [token for tree in trees for request in tree.requests for token in request.targets]
    log_probs_P, greedy_P = target_log_probs(
        model,
        x_BTD.flatten(0, 1)[torch.from_numpy(places_N).to(device)],
        torch.from_numpy(rows_P).to(device),
        torch.tensor(targets, device=device),
    )
    lengths = [len(columns) for columns in pairs]
    # Summed on the CPU: Apple's GPUs know no float64.
    for log_probs, greedy in zip(log_probs_P.cpu().split(lengths), greedy_P.cpu().split(lengths), strict=True):
        yield Score(float(log_probs.double().sum()), bool(greedy.all()))


def _pad(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def target_log_probs(model: Transformer, x_ND: Tensor, rows_P: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability in fp32 at its row of x, and whether it is the first of the most likely tokens.

    The vocabulary goes by in pieces whose logits stay in the caches; what remains of each is the maximum and the sum of
    exponentials (arXiv 1805.02867). All logits at once would be written and read again several times.
    """
    vocab_size, device = len(model.head_weight), x_ND.device
    piece = _PIECE.get(device.type, vocab_size)
    peak_N = torch.full((len(x_ND),), float("-inf"), device=device)
    total_N = torch.zeros_like(peak_N)
    best_N = torch.zeros(len(x_ND), dtype=torch.long, device=device)
    logits_P = torch.empty(len(targets_P), device=device)
    for start in range(0, vocab_size, piece):
        logits_NC = F.linear(x_ND, model.head_weight[start : start + piece]).float()
        here = ((targets_P >= start) & (targets_P < start + piece)).nonzero()[:, 0]
        logits_P[here] = logits_NC[rows_P[here], targets_P[here] - start]
        highest_N, index_N = logits_NC.max(-1)
        best_N = torch.where(highest_N > peak_N, index_N + start, best_N)
        highest_N = torch.maximum(peak_N, highest_N)
        total_N *= (peak_N - highest_N).exp_()
        total_N += logits_NC.sub_(highest_N[:, None]).exp_().sum(-1)
        peak_N = highest_N
    log_probs_P = logits_P - (peak_N + total_N.log_())[rows_P]
    return log_probs_P, best_N[rows_P] == targets_P
