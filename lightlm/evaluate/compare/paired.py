"""Statistics of two models on the same documents, in float64.

A figure is g(sum of x / sum of w) over documents: an accuracy is the mean of zeros and ones (all w = 1), bits per byte
-log2(e) times log-likelihoods over bytes. The interval of a difference is a paired bootstrap's over documents; its
p-value is that of the test in which each document's two answers might as well have been the other way round. For
zeros and ones this is McNemar's exact test (Psychometrika 12, 1947). Shapes: N documents, R resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
SIGNIFICANCE = 0.05
_CHUNK = 2_000_000  # documents drawn at a time: 16 MB of indices
_SAME = 1e-9  # relative, below which two figures are the same but for rounding


def _identity(ratio: Floats) -> Floats:
    return ratio


def _bits(ratio: Floats) -> Floats:
    return -ratio / math.log(2)


def _exponential(ratio: Floats) -> Floats:
    return np.exp(-ratio)


# lm-eval's aggregations that are made of sums: mean, bits_per_byte, perplexity and weighted_perplexity.
FORMS: tuple[Callable[[Floats], Floats], ...] = (_identity, _bits, _exponential)


@dataclass(frozen=True)
class Difference:
    """Second model less first.

    Args:
        low, high: the 95% interval.
        p_value: two-sided, for there being no difference.
        method: of the p-value.
    """

    value: float
    low: float
    high: float
    p_value: float
    method: str


def form_of(x_N: Floats, w_N: Floats, figure: float) -> Callable[[Floats], Floats] | None:
    """The g by which the documents give the reported figure; None if they do not, as with F1 or BLEU."""
    total = w_N.sum()
    if not total > 0 or not np.isfinite(x_N).all():
        return None
    ratio = np.asarray(x_N.sum() / total)
    with np.errstate(over="ignore"):
        return next((form for form in FORMS if math.isclose(float(form(ratio)), figure, rel_tol=1e-6)), None)


def difference(
    first_N: Floats, second_N: Floats, w_N: Floats, form: Callable[[Floats], Floats], seed: int = 0
) -> Difference:
    """How far the second model's figure is from the first's, on the same documents with the same weights."""
    total = w_N.sum()
    value = float(form(second_N.sum() / total) - form(first_N.sum() / total))
    if is_binary(first_N) and is_binary(second_N) and (w_N == 1).all() and form is _identity:
        gained, lost = int((second_N > first_N).sum()), int((second_N < first_N).sum())
        low, high = _interval(_binary_bootstrap(gained, lost, len(w_N), seed))
        return Difference(value, low, high, mcnemar(gained, lost), "exact McNemar test")
    low, high = _interval(bootstrap(first_N, second_N, w_N, form, seed))
    return Difference(value, low, high, sign_flip(second_N - first_N, seed), "randomisation test")


def is_binary(x_N: Floats) -> bool:
    return bool(((x_N == 0) | (x_N == 1)).all())


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value: that of `gained` heads in as many fair throws as there are documents which
    only one of the models has right."""
    count, fewer = gained + lost, min(gained, lost)
    term = tail = 1
    for k in range(fewer):
        term = term * (count - k) // (k + 1)
        tail += term
    return min(2 * tail / 2**count, 1.0)  # whole numbers of any size: Python divides them with correct rounding


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that the chance of any false find among them stays at the level of one (Holm 1979)."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min((len(p_values) - rank) * p_values[i], 1.0))
        adjusted[i] = largest
    return adjusted


def sign_flip(difference_N: Floats, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of the sum of differences when each might have had the other sign, by random signs; never
    zero, since the data are one of the arrangements (Phipson and Smyth, arXiv 1603.05766)."""
    difference_N = difference_N[difference_N != 0]
    if not len(difference_N):
        return 1.0
    observed = abs(float(difference_N.sum())) * (1 - _SAME)
    generator = np.random.default_rng(seed)
    reached = 0
    for rows in _chunks(resamples, len(difference_N)):
        bits = np.frombuffer(generator.bytes(-(-rows * len(difference_N) // 8)), dtype=np.uint8)
        signs_RN = np.unpackbits(bits, count=rows * len(difference_N)).reshape(rows, -1)
        sums_R = 2 * (signs_RN @ difference_N) - difference_N.sum()
        reached += int((np.abs(sums_R) >= observed).sum())
    return (reached + 1) / (resamples + 1)


def bootstrap(
    first_N: Floats,
    second_N: Floats,
    w_N: Floats,
    form: Callable[[Floats], Floats],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Floats:
    """Differences (R,) between the figures on as many documents, drawn with replacement; the same for both models."""
    generator = np.random.default_rng(seed)
    parts = []
    for rows in _chunks(resamples, len(w_N)):
        drawn_RN = generator.integers(len(w_N), size=(rows, len(w_N)))
        totals_R = w_N[drawn_RN].sum(axis=1)
        first_R, second_R = (x_N[drawn_RN].sum(axis=1) / totals_R for x_N in (first_N, second_N))
        parts.append(form(second_R) - form(first_R))
    return np.concatenate(parts)


def _binary_bootstrap(gained: int, lost: int, count: int, seed: int) -> Floats:
    """The same for zeros and ones, where a resample is a draw of how many of its documents are gained and lost."""
    shares = [gained / count, lost / count, (count - gained - lost) / count]
    drawn_R3 = np.random.default_rng(seed).multinomial(count, shares, size=RESAMPLES)
    return (drawn_R3[:, 0] - drawn_R3[:, 1]) / count


def _interval(values_R: Floats) -> tuple[float, float]:
    low, high = np.quantile(values_R, (SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2))
    return float(low), float(high)


def _chunks(resamples: int, documents: int) -> list[int]:
    rows = max(_CHUNK // documents, 1)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]
