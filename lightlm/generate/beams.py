"""Beam search: the continuations of highest probability that a search of a given width finds.

Shapes: B beams, V vocabulary.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from lightlm.errors import UsageError
from lightlm.generate.batch import FinishReason, Request
from lightlm.generate.prefill import read
from lightlm.generate.sampling import GREEDY, Sampling
from lightlm.generate.sampling.draw import Row, adjusted
from lightlm.generate.step.fast import forward_of
from lightlm.model.transformer import Transformer

MAX_LENGTH_PENALTY = 10  # a length to this power is far from the largest float


@dataclass(frozen=True)
class Beam:
    """A continuation.

    Args:
        ids: new tokens, without a stop token.
        score: the sum of the log-probabilities of all tokens, the stop token included, divided by their number to the
            power of the length penalty.
    """

    ids: list[int]
    finish_reason: FinishReason
    score: float


@dataclass
class _Search:
    """The beams of one prompt: those that run, in the order of the rows of the cache, and the best finished ones."""

    num_beams: int
    length_penalty: float
    running: list[tuple[list[int], float]]  # new tokens, and the sum of their log-probabilities
    finished: list[Beam]

    def finish(self, ids: list[int], total: float, length: int, reason: FinishReason) -> None:
        """Keep a beam of `length` tokens if it is among the best."""
        self.finished.append(Beam(ids, reason, total / length**self.length_penalty))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.num_beams]

    @property
    def done(self) -> bool:
        """Whether no running beam would be among the best finished ones if it ended now."""
        if not self.running:
            return True
        ids, total = self.running[0]
        return (
            len(self.finished) == self.num_beams and total / len(ids) ** self.length_penalty <= self.finished[-1].score
        )


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompt: list[int],
    num_beams: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    length_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
) -> list[Beam]:
    """Return up to `num_beams` continuations of a prompt, the best first.

    The search ends once it has `num_beams` continuations that ended, and the best running one has no better score, as
    by default in transformers.

    Args:
        sampling: bias, penalties and bans; they change log-probabilities as they change logits elsewhere. Temperature
            and filters have no effect.
        length_penalty: above 0 favors long continuations, since log-probabilities are negative; 0 compares plain sums.
        stop_ids: tokens that end a continuation.
        vocab_size: the tokenizer's; ids at or above it are left out. None allows all ids of the model.

    Raises:
        LightLMError: the prompt is empty or longer than the model's context.
        UsageError: a number is out of its range, or `sampling` names an id that does not exist.
    """
    if num_beams < 1:
        raise UsageError(f"beams must be at least 1, is {num_beams}")
    if not abs(length_penalty) <= MAX_LENGTH_PENALTY:
        raise UsageError(
            f"length-penalty must be from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}, is {length_penalty}"
        )
    Request(prompt, max_new_tokens, sampling).check(model.config)
    sampling.check_ids(vocab_size or model.config.vocab_size)
    cache = model.new_cache(1, len(prompt) + max_new_tokens)
    forward = forward_of(model)
    logits_BV = read(forward, prompt, cache)
    search = _Search(num_beams, length_penalty, [([], 0.0)], [])
    while True:
        rows = [Row(sampling, None, prompt, ids, stop_ids) for ids, _ in search.running]
        log_probs_BV = logits_BV.float().log_softmax(-1)[:, :vocab_size]
        totals_BV = adjusted(log_probs_BV, rows).cpu().double()
        totals_BV += torch.tensor([[total] for _, total in search.running], dtype=torch.float64)
        full = cache.lengths[0] == model.config.max_seq_len
        parents = _extend(search, totals_BV, max_new_tokens, stop_ids, context_is_full=full)
        if search.done:
            return search.finished
        if parents != list(range(len(cache.lengths))):
            cache.select(parents)
        tokens_B1 = torch.tensor([[ids[-1]] for ids, _ in search.running], device=model.device)
        logits_BV = forward(tokens_B1, cache)[:, -1]


def _extend(
    search: _Search, totals_BV: Tensor, max_new_tokens: int, stop_ids: Collection[int], *, context_is_full: bool
) -> list[int]:
    """Replace the running beams by their best extensions and return the row that each one extends.

    Of all extensions, those that end a beam count among the best `num_beams` only. Enough are looked at to continue as
    many beams even if each may end with all stop ids.
    """
    num_beams, vocab_size = search.num_beams, totals_BV.shape[-1]
    count = min((1 + max(1, len(stop_ids))) * num_beams, totals_BV.numel())
    totals, places = totals_BV.flatten().topk(count)
    running: list[tuple[list[int], float]] = []
    parents: list[int] = []
    for rank, (total, place) in enumerate(zip(totals.tolist(), places.tolist(), strict=True)):
        if total == -math.inf:
            break
        parent, token = divmod(place, vocab_size)
        ids = search.running[parent][0]
        length = len(ids) + 1
        if token in stop_ids:
            if rank < num_beams:
                search.finish(ids, total, length, "stop")
        elif length == max_new_tokens or context_is_full:
            if rank < num_beams:
                search.finish([*ids, token], total, length, "length" if length == max_new_tokens else "context")
        elif len(running) < num_beams:
            running.append(([*ids, token], total))
            parents.append(parent)
    search.running = running
    return parents
