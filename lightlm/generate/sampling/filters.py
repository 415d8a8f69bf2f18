"""Which tokens may be drawn: temperature, top-k, top-p, min-p and typical sampling.

Shapes: B rows, V vocabulary, C candidates of a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightlm.generate.sampling.settings import Sampling

_FIRST_CANDIDATES = 256  # on one CPU core, sorting 50k logits takes 20 ms, finding the 200 largest 0.26 ms


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the tokens that may be drawn: relative probabilities (B, C) on the CPU, and their ids (B, C).

    The temperature must not be 0. Tokens that a filter drops have probability 0. The rest need not sum to 1. Where
    logits are equal, no more tokens stay than the settings ask for. The logits (200 KB per row at 50k tokens) are
    copied to the CPU, so all devices draw from the same generators.
    """
    logits_BV = logits_BV.to("cpu", torch.promote_types(logits_BV.dtype, torch.float32))
    vocab_size = logits_BV.shape[-1]
    if sampling.top_k is not None:
        top_BC, ids_BC = logits_BV.topk(min(sampling.top_k, vocab_size))
        probs_BC = nucleus((top_BC.double() / sampling.temperature).softmax(-1), sampling.top_p)
    elif sampling.top_p < 1:
        probs_BC, ids_BC = _most_likely(logits_BV, sampling.temperature, sampling.top_p)
        probs_BC = nucleus(probs_BC, sampling.top_p)
    else:
        probs_BC = (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(sampling.temperature).exp_()
        ids_BC = torch.arange(vocab_size).expand_as(logits_BV)
    if sampling.min_p > 0:
        probs_BC = above_share(probs_BC, sampling.min_p)
    if sampling.typical_p < 1:
        probs_BC, order_BC = typical(probs_BC, sampling.typical_p)
        ids_BC = ids_BC.gather(-1, order_BC)
    return probs_BC, ids_BC


def nucleus(probs_BC: Tensor, top_p: float) -> Tensor:
    """Set each probability to 0 that comes after the mass has reached `top_p`; they are sorted from high to low."""
    mass_before_BC = probs_BC.cumsum(-1) - probs_BC
    mass_before_BC[:, 0] = 0  # the first token always stays
    return probs_BC.masked_fill(mass_before_BC >= top_p, 0)


def above_share(probs_BC: Tensor, min_p: float) -> Tensor:
    """Set each probability to 0 that is below `min_p` times the highest of its row (arXiv 2407.01082)."""
    return probs_BC.masked_fill(probs_BC < min_p * probs_BC.amax(-1, keepdim=True), 0)


def typical(probs_BC: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Keep the tokens whose surprisal is nearest to the entropy, until their mass reaches `mass` (arXiv 2202.00666).

    Returns:
        The probabilities, scaled to sum to 1 before the cut and sorted by that distance, and their columns.
    """
    probs_BC = probs_BC / probs_BC.sum(-1, keepdim=True)
    surprisal_BC = -probs_BC.log()  # infinite for those that another filter dropped
    entropy_B1 = torch.special.entr(probs_BC).sum(-1, keepdim=True)
    scores_BC = -(surprisal_BC - entropy_B1).abs()
    size = scores_BC.shape[-1]
    for count in _counts(size):
        columns_BC = scores_BC.topk(count).indices
        nearest_BC = probs_BC.gather(-1, columns_BC)
        if count == size or bool((nearest_BC.sum(-1) >= mass).all()):
            break
    return nucleus(nearest_BC, mass), columns_BC


def _most_likely(logits_BV: Tensor, temperature: float, mass: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities in float64 and the ids of the most likely tokens, enough of them to reach `mass`.

    Only their total over all tokens is computed in the precision of the logits: in float64, the passes over the whole
    vocabulary would take twice as long.
    """
    size = logits_BV.shape[-1]
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    weights_BV = (logits_BV - largest_B1).div_(temperature).exp_()
    total_B1 = weights_BV.sum(-1, keepdim=True, dtype=torch.float64)
    for count in _counts(size):
        top_BC, ids_BC = logits_BV.topk(count)
        probs_BC = ((top_BC.double() - largest_B1) / temperature).exp() / total_B1
        if count == size or bool((probs_BC.sum(-1) >= mass).all()):
            break
    return probs_BC, ids_BC


def _counts(size: int) -> Iterator[int]:
    """Yield how many of `size` tokens to sort, until they suffice; the last count is `size`."""
    count = _FIRST_CANDIDATES
    while count < size:
        yield count
        count *= 8
    yield size
