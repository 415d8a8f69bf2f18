"""Log-likelihoods of continuations. Tokens that requests share are computed once, the head only for scored positions.

Shapes: B rows, T columns, D hidden size, N scored positions, P pairs of a scored position and a target, C a chunk of
the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightlm.device import keep_freed_memory, release_memory
from lightlm.errors import LightLMError, is_out_of_memory
from lightlm.evaluate.scoring.batches import BatchSize
from lightlm.evaluate.scoring.packing import Request, Tree, batches, plan
from lightlm.model.decoding.cache import KVCache
from lightlm.model.decoding.trees import Trees
from lightlm.model.transformer import Transformer

# Columns of the head at a time, so that the logits of 1,024 positions (4 MB) stay in a CPU's caches.
_CHUNK = 1024
_LOGITS = 1 << 26  # logits at a time on other devices, where kernel launches cost more: 256 MB


@dataclass(frozen=True)
class Score:
    """The sum of a continuation's log-probabilities (nats), and whether greedy decoding gives the continuation."""

    log_likelihood: float
    greedy: bool


def answer_windows(context: list[int], answer: list[int], size: int) -> list[tuple[list[int], list[int]]]:
    """Return (context, answer) as one pair or, if a context of `size` tokens does not hold the answer, as several.

    Each of them scores the next tokens of the answer, half a context of them, after the half that precedes them. The
    log-likelihoods add up to that of the answer.
    """
    if len(answer) <= size:
        return [(context, answer)]
    step = (size + 1) // 2
    return [(context + answer[:start], answer[start : start + step]) for start in range(0, len(answer), step)]


@torch.no_grad()
def score(
    model: Transformer,
    requests: list[tuple[list[int], list[int]]],
    batch_size: BatchSize,
    on_done: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """Score each (context ids, continuation ids); both must have at least one token.

    A request longer than the model's context loses tokens from the left, as in lm-eval's `hf` model: the last
    max_seq_len + 1 tokens of context + continuation stay, the model reads all but the last of them, and the last
    len(continuation) outputs are scored.

    Args:
        batch_size: halved for the remaining requests if the device runs out of memory.
        on_done: called with the number of newly finished requests.

    Raises:
        LightLMError: a continuation is empty, or by itself longer than the model's context.
        torch.OutOfMemoryError: the memory does not hold a single request.
    """
    if model.device.type == "cpu":
        keep_freed_memory()
    scores: list[Score] = [Score(0.0, True)] * len(requests)
    context_size, pending = model.config.max_seq_len, {}
    for index, (context, continuation) in enumerate(requests):
        if not continuation:
            raise LightLMError("a task asks for the score of an empty answer; check its doc_to_choice")
        if len(continuation) > context_size:
            raise LightLMError(
                f"an answer has {len(continuation):,} tokens, but the model's context holds {context_size:,}; "
                "this task does not fit this model"
            )
        pending[index] = Request(index, tuple((context + continuation)[-(context_size + 1) : -1]), continuation)
    while pending:
        try:
            for request, result in _score_all(model, list(pending.values()), batch_size):
                scores[request.index] = result
                del pending[request.index]
                on_done(1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch_size = batch_size.halved()
        if pending:
            release_memory(model.device)  # not within `except`, where the error still holds the failed batch's tensors
    return scores


def _score_all(model: Transformer, requests: list[Request], batch_size: BatchSize) -> Iterator[tuple[Request, Score]]:
    # A block's products take 24 D^2 operations per token. Attention takes 4 D per pair, at a quarter of the speed.
    attention_cost = 1 / (1.5 * model.config.hidden_size)
    for tokens, followers in plan(requests, batch_size, attention_cost):
        prefix = None
        if tokens:
            prefix = model.new_cache(1, len(tokens))
            model.hidden_states(torch.tensor([tokens], device=model.device), prefix)
        for trees in batches(followers, batch_size):
            done = [request for tree in trees for request in tree.requests]
            yield from zip(done, _score_batch(model, trees, prefix), strict=True)


def _score_batch(model: Transformer, trees: list[Tree], prefix: KVCache | None) -> Iterator[Score]:
    """Yield the scores of all requests, tree by tree."""
    width, device = len(trees[0]), model.device

    def padded(rows: Iterable[list[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)

    tokens_BT, positions_BT = padded(tree.tokens for tree in trees), padded(tree.positions for tree in trees)
    ends_BT = torch.tensor([[*tree.ends, *range(len(tree) + 1, width + 1)] for tree in trees], device=device)
    x_BTD = model.hidden_states(tokens_BT, trees=Trees(positions_BT, ends_BT, prefix))
    pairs = [columns for tree in trees for columns in tree.scored]
    starts = (row * width for row, tree in enumerate(trees) for _ in tree.scored)
    places_P = np.concatenate([np.array(columns) + start for columns, start in zip(pairs, starts, strict=True)])
    # Requests may share scored positions: those in a common prefix, and the last of a question with short answers.
    places_N, rows_P = np.unique(places_P, return_inverse=True)
    targets = [token for tree in trees for request in tree.requests for token in request.targets]
    log_probs_P, greedy_P = target_log_probs(
        model,
        x_BTD.flatten(0, 1)[torch.from_numpy(places_N).to(device)],
        torch.from_numpy(rows_P).to(device),
        torch.tensor(targets, device=device),
    )
    lengths = [len(columns) for columns in pairs]
    # Summed on the CPU, because Apple's GPUs lack float64.
    for log_probs, greedy in zip(log_probs_P.cpu().split(lengths), greedy_P.cpu().split(lengths), strict=True):
        yield Score(float(log_probs.double().sum()), bool(greedy.all()))


def target_log_probs(model: Transformer, x_ND: Tensor, rows_P: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability in fp32 at its row of x, and whether it is the first most likely token.

    Logits are computed for a chunk of the vocabulary at a time, which stays in the caches, and reduced to their maximum
    and sum of exponentials (arXiv 1805.02867). All logits at once would go through memory several times.
    """
    weight_VD, device = model.head_weight, x_ND.device
    chunk = _CHUNK if device.type == "cpu" else max(_LOGITS // max(len(x_ND), 1), _CHUNK)
    peak_N = torch.full((len(x_ND),), float("-inf"), device=device)
    total_N = torch.zeros_like(peak_N)
    best_N = torch.zeros(len(x_ND), dtype=torch.long, device=device)
    logits_P = torch.empty(len(targets_P), device=device)
    for start in range(0, len(weight_VD), chunk):
        logits_NC = fp32_logits(x_ND, weight_VD[start : start + chunk])
        here = ((targets_P >= start) & (targets_P < start + chunk)).nonzero()[:, 0]
        logits_P[here] = logits_NC[rows_P[here], targets_P[here] - start]
        highest_N, index_N = logits_NC.max(-1)
        best_N = torch.where(highest_N > peak_N, index_N + start, best_N)
        highest_N = torch.maximum(peak_N, highest_N)
        total_N *= (peak_N - highest_N).exp_()
        total_N += logits_NC.sub_(highest_N[:, None]).exp_().sum(-1)
        peak_N = highest_N
    log_probs_P = logits_P - (peak_N + total_N.log_())[rows_P]
    return log_probs_P, best_N[rows_P] == targets_P


def fp32_logits(x_ND: Tensor, weight_CD: Tensor) -> Tensor:
    """Return x W^T (N, C) in fp32, computed on each device's fast unit: a bf16 logit of 20 is a multiple of 0.125."""
    if x_ND.device.type == "cuda" and x_ND.dtype != torch.float32:
        return torch.mm(x_ND, weight_CD.T, out_dtype=torch.float32)
    if x_ND.device.type != "cpu" or x_ND.dtype != torch.bfloat16:
        return F.linear(x_ND, weight_CD).float()
    before = torch.get_float32_matmul_precision()
    # A CPU's bf16 units take fp32 operands rounded to bf16, which is exact for operands converted from bf16.
    torch.set_float32_matmul_precision("medium")
    try:
        return F.linear(x_ND.float(), weight_CD.float())
    finally:
        torch.set_float32_matmul_precision(before)
