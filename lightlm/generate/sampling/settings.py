"""The settings of sampling and their ranges."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

from lightlm.errors import UsageError

MAX_BIAS = 100.0  # as in OpenAI's API
MAX_PENALTY = 2.0  # likewise

# Setting -> whether a value is in its range, the range in words, and the value that turns the setting off in words.
_RANGES: dict[str, tuple[Any, str, str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "0 (greedy) or above", ""),
    "top_k": (lambda x: x is None or (_whole(x) and x >= 1), "at least 1", "leave it out to keep every token"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1", "1 keeps every token"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1", "0 keeps every token"),
    "typical_p": (lambda x: 0 < x <= 1, "above 0 and at most 1", "1 keeps every token"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "above 0", "1 changes nothing"),
    "frequency_penalty": (lambda x: abs(x) <= MAX_PENALTY, "from -2 to 2", "0 changes nothing"),
    "presence_penalty": (lambda x: abs(x) <= MAX_PENALTY, "from -2 to 2", "0 changes nothing"),
    "no_repeat_ngram": (lambda x: _whole(x) and x >= 0, "a whole number of tokens", "0 allows all repetition"),
    "min_new_tokens": (lambda x: _whole(x) and x >= 0, "a whole number of tokens", "0 sets no minimum"),
}


@dataclass(frozen=True)
class Sampling:
    """How to turn logits into a token.

    The defaults are for small models, whose distributions have a long tail of bad tokens with several percent of the
    mass: within 200 tokens, some would be drawn. A nucleus of 0.95 cuts that tail and, unlike a fixed top-k, adapts to
    how certain the model is. A temperature of 0.8 favors likely tokens without the loops of greedy decoding.

    They apply in the order of transformers' processors: logit_bias, repetition_penalty, frequency_penalty and
    presence_penalty, no_repeat_ngram, min_new_tokens, temperature, top_k, top_p, min_p, typical_p. Each filter sees the
    probabilities that the one before it left, scaled to sum to 1.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest of these whose probabilities sum to top_p (arXiv 1904.09751); 1 keeps all.
        min_p: keep those with at least this share of the highest probability (arXiv 2407.01082); 0 keeps all.
        typical_p: keep the fewest whose probabilities sum to typical_p, those first whose surprisal is nearest to the
            entropy (arXiv 2202.00666); 1 keeps all.
        repetition_penalty: divides positive logits of the tokens in prompt and answer, multiplies negative ones
            (arXiv 1909.05858); 1 changes nothing.
        frequency_penalty: subtracted from a token's logit for each time it is in the answer, as in OpenAI's API.
        presence_penalty: subtracted once from the logits of all tokens in the answer.
        no_repeat_ngram: ban each token that would repeat so many tokens of prompt and answer (arXiv 1705.04304); 0 is
            off.
        logit_bias: pairs of an id and what is added to its logit, from -100 (never) to 100 (always).
        min_new_tokens: ban the stop ids until the answer has so many tokens.

    Raises:
        UsageError: a value is out of its range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for setting, (fits, accepted, neutral) in _RANGES.items():
            value = getattr(self, setting)
            if not fits(value):
                raise UsageError(
                    f"{setting.replace('_', '-')} must be {accepted}, is {value}" + (f"; {neutral}" if neutral else "")
                )
        for token, bias in self.logit_bias:
            if not (_whole(token) and token >= 0 and abs(bias) <= MAX_BIAS):
                raise UsageError(
                    f"logit-bias must pair a token id with a number from -100 to 100, is {token} and {bias}"
                )

    @property
    def filters(self) -> tuple[float, int | None, float, float, float]:
        """What `candidates` depends on; rows where it is equal are drawn together."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p

    @property
    def adjusts(self) -> bool:
        """Whether logits change before the temperature divides them."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
            or self.no_repeat_ngram > 0
            or self.min_new_tokens > 0
            or bool(self.logit_bias)
        )

    def check_most(self, max_new_tokens: int) -> None:
        """Raise UsageError if an answer may not have so many tokens at most."""
        if not (_whole(max_new_tokens) and max_new_tokens >= 1):
            raise UsageError(f"max-new-tokens must be a whole number, at least 1, is {max_new_tokens}")
        if max_new_tokens < self.min_new_tokens:
            raise UsageError(
                f"min-new-tokens is {self.min_new_tokens}, above max-new-tokens, which is {max_new_tokens}"
            )

    def check_ids(self, vocab_size: int) -> None:
        """Raise UsageError if `logit_bias` names an id that the tokenizer lacks."""
        for token, _ in self.logit_bias:
            if token >= vocab_size:
                raise UsageError(f"logit-bias names the token id {token}, the tokenizer has ids below {vocab_size:,}")


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


DEFAULT = Sampling()
GREEDY = Sampling(temperature=0.0)
