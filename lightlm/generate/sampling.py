"""Choosing the next token from logits: temperature, top-k and nucleus sampling.

Shapes: B rows, V vocabulary, C candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightlm.errors import UsageError

if TYPE_CHECKING:  # settings out of range are reported before torch is imported
    import torch
    from torch import Tensor

_FIRST_CANDIDATES = 256  # on one CPU core, sorting 50k logits takes 20 ms, finding the 200 largest 0.26 ms


@dataclass(frozen=True)
class Sampling:
    """How to turn logits into a token.

    The defaults are for small models, whose distributions have a long tail of bad tokens with several percent of the
    mass: within 200 tokens, some would be drawn. A nucleus of 0.95 cuts that tail and, unlike a fixed top-k, adapts to
    how certain the model is. A temperature of 0.8 favors likely tokens without the loops of greedy decoding.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest of these whose probabilities sum to top_p (arXiv 1904.09751); 1 keeps all.

    Raises:
        UsageError: a value is out of its range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 (greedy) or above, is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k must be at least 1, is {self.top_k}; leave it out to keep every token")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, is {self.top_p}; 1 keeps every token")


DEFAULT = Sampling()
GREEDY = Sampling(temperature=0.0)


def sample(logits_BV: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """Draw one token per row. Row b draws one number from CPU generator b, so rows do not depend on each other."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    import torch

    probs_BC, ids_BC = candidates(logits_BV, sampling)
    draws_B = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    cumulative_BC = probs_BC.cumsum(-1)
    # The first candidate whose cumulative mass exceeds the draw. A candidate of mass 0 is never the first.
    chosen_B1 = (cumulative_BC <= draws_B[:, None] * cumulative_BC[:, -1:]).sum(-1, keepdim=True)
    return ids_BC.gather(-1, chosen_B1.clamp(max=probs_BC.shape[-1] - 1))[:, 0].tolist()


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the tokens that may be drawn: relative probabilities (B, C) in float64 on the CPU, and their ids (B, C).

    Tokens outside the nucleus have probability 0. Where logits are equal, no more tokens stay than top-k and top-p ask
    for. The logits (200 KB per row at 50k tokens) are copied to the CPU, so all devices draw from the same generators.
    """
    import torch

    logits_BV = logits_BV.cpu().double() / sampling.temperature
    vocab_size = logits_BV.shape[-1]
    if sampling.top_k is not None:
        top_BC, ids_BC = logits_BV.topk(min(sampling.top_k, vocab_size))
        return nucleus(top_BC.softmax(-1), sampling.top_p), ids_BC
    if sampling.top_p == 1:
        return logits_BV.softmax(-1), torch.arange(vocab_size).expand_as(logits_BV)
    log_total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    count = _FIRST_CANDIDATES
    while True:
        top_BC, ids_BC = logits_BV.topk(min(count, vocab_size))
        probs_BC = (top_BC - log_total_B1).exp()
        if count >= vocab_size or bool((probs_BC.sum(-1) >= sampling.top_p).all()):
            return nucleus(probs_BC, sampling.top_p), ids_BC
        count *= 8


def nucleus(probs_BC: Tensor, top_p: float) -> Tensor:
    """Set each probability to 0 that comes after the mass has reached `top_p`; they are sorted from high to low."""
    mass_before_BC = probs_BC.cumsum(-1) - probs_BC
    mass_before_BC[:, 0] = 0  # the most likely token always stays
    return probs_BC.masked_fill(mass_before_BC >= top_p, 0)
