"""Speculation: guess several tokens, compute them in one pass, and keep those that plain decoding would have drawn.

A guess is kept if it equals the token that the row draws at its place, from the model's own distribution and with the
row's own random number. So guesses decide how fast a text comes and nothing else: with the same seed, it is the text of
plain decoding (logits differ by rounding). For a guess without a distribution, such as one that is looked up, the
probability of keeping it is that of the rule of Leviathan et al. (arXiv 2211.17192), which is the highest possible. A
draft model guesses with a copy of the row's random generator, so that both models draw with the same random number (see
`draw`).

Shapes: T positions, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightlm.checkpoint import LoadedModel
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.prefill import read
from lightlm.generate.sampling.draw import Row, sample
from lightlm.generate.step.fast import forward_of
from lightlm.model.transformer import Transformer

_NGRAMS = (3, 2)  # lengths of the endings that `Lookup` searches for, the first found wins
_WARM_UP = 4  # plain steps that are measured before the first guess
_TRIAL = 4  # rounds of guesses before they are judged
_PAUSES = (32, 512)  # plain steps after guesses were slower, at first and at most
_DECAY = 0.9  # of a measured round in the average, per later round


class Guesser(Protocol):
    """A source of guesses."""

    def guess(self, row: Row, count: int) -> list[int]:
        """Return up to `count` tokens that may follow the row's prompt and answer."""


class Lookup:
    """Guess that the text repeats itself: what followed the last tokens where they occurred before (prompt lookup)."""

    def guess(self, row: Row, count: int) -> list[int]:
        """Return the tokens after the latest earlier occurrence of the last 3, or else 2, tokens."""
        ids = np.array([*row.prompt, *row.new], dtype=np.int64)
        for size in _NGRAMS:
            if len(ids) <= size:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
            places = (windows == ids[-size:]).all(axis=1).nonzero()[0]
            if len(places):
                start = places[-1] + size
                return ids[start : start + count].tolist()
        return []


class Draft:
    """Guess with a smaller model of the same tokenizer.

    Args:
        model: the draft, in evaluation mode.
        vocab_size: the tokenizer's size.
    """

    def __init__(self, model: Transformer, vocab_size: int) -> None:
        self._forward, self._vocab_size, self._max_seq_len = forward_of(model), vocab_size, model.config.max_seq_len
        self._cache = model.new_cache(1, 1)
        self._ids: list[int] = []  # what the cache holds

    @torch.no_grad()
    def guess(self, row: Row, count: int) -> list[int]:
        """Return `count` tokens; fewer where its context ends."""
        ids = [*row.prompt, *row.new]
        count = min(count, self._max_seq_len - len(ids) + 1)
        if count < 1:
            return []
        # At least the last token is read, for its logits.
        shared = min(_common_prefix(self._ids, ids), len(ids) - 1)
        self._cache.cut(0, shared)
        if len(ids) + count > self._cache.max_len:
            slots = max(len(ids) + count, self._cache.max_len * 3 // 2)
            self._cache.reserve(1, min(slots, self._max_seq_len))
        generator = None
        if row.generator is not None:
            generator = torch.Generator()
            generator.set_state(row.generator.get_state())
        guessing = replace(row, generator=generator, new=list(row.new))
        logits_1V = read(self._forward, ids[shared:], self._cache)
        guesses: list[int] = []
        while True:
            [token] = sample(logits_1V, [guessing], self._vocab_size)
            guesses.append(token)
            if len(guesses) == count or token in row.stop_ids:
                self._ids = [*ids, *guesses[:-1]]
                return guesses
            guessing.new.append(token)
            logits_1V = read(self._forward, [token], self._cache)


def draft_of(draft: LoadedModel, loaded: LoadedModel) -> Draft:
    """Return a loaded model as the draft of another.

    Raises:
        LightLMError: their tokenizers differ, so that one's guesses mean nothing to the other.
    """
    if not draft.tokenizer.has_ids_of(loaded.tokenizer):
        raise LightLMError(
            f"the draft {draft.name} has another tokenizer than {loaded.name}; a draft needs the same tokens with the "
            "same ids, as two runs on one data folder have"
        )
    return Draft(draft.model, loaded.tokenizer.vocab_size)


class Pace:
    """Whether guesses pay, from the time that steps and rounds of guesses took."""

    def __init__(self) -> None:
        self._plain, self._guessed = _Rate(), _Rate()
        self._trial = 0  # rounds since guesses were last taken up
        self._wait = _WARM_UP  # plain steps until they are
        self._pause = _PAUSES[0]

    @property
    def guesses(self) -> bool:
        """Whether to guess next."""
        return self._wait == 0

    def note_plain(self, seconds: float) -> None:
        """Note a plain step, which makes one token."""
        self._plain.add(seconds, 1)
        self._wait = max(0, self._wait - 1)

    def note_round(self, seconds: float, tokens: int) -> None:
        """Note a round of guesses and the tokens that it made. Guesses pause if they are slower than plain steps."""
        self._trial += 1
        if self._trial == 1:  # a draft reads the whole prompt first
            self._guessed = _Rate()
            return
        self._guessed.add(seconds, tokens)
        if self._trial < _TRIAL:
            return
        if self._guessed.value < self._plain.value:
            self._pause = _PAUSES[0]
            return
        self._trial, self._wait = 0, self._pause
        self._pause = min(2 * self._pause, _PAUSES[1])


class _Rate:
    """Seconds per token, recent ones counting more."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds = _DECAY * self._seconds + seconds
        self._tokens = _DECAY * self._tokens + tokens

    @property
    def value(self) -> float:
        return self._seconds / self._tokens


class Speculation:
    """Guesses for a batch of one row, made only while they pay.

    Args:
        guesser: where guesses come from.
        count: guesses per round.
        pace: decides when to guess; None measures.

    Raises:
        UsageError: count is below 1.
    """

    def __init__(self, guesser: Guesser, count: int, pace: Pace | None = None) -> None:
        if count < 1:
            raise UsageError(f"speculation needs at least 1 guess per round, got {count}")
        self.pace = pace or Pace()
        self.guessed = self.kept = 0  # tokens since `take_counts`
        self._guesser, self._count = guesser, count

    def take_counts(self) -> tuple[int, int]:
        """Return how many guesses were kept, and how many there were, since the last call."""
        counts = self.kept, self.guessed
        self.guessed = self.kept = 0
        return counts

    def guess(self, row: Row, most: int) -> list[int]:
        """Return up to `most` guesses; none while they do not pay."""
        count = min(self._count, most)
        return self._guesser.guess(row, count) if count > 0 and self.pace.guesses else []

    def keep(self, logits_TV: Tensor, guesses: Sequence[int], row: Row, vocab_size: int | None) -> list[int]:
        """Return the tokens that the row draws: the guesses that are right, then one more unless a stop token came.

        Args:
            logits_TV: the logits after the row's last token and after each guess.
        """
        drawing = replace(row, new=list(row.new))
        for place, guess in enumerate([*guesses, None]):
            [token] = sample(logits_TV[place : place + 1], [drawing], vocab_size)
            drawing.new.append(token)
            if token != guess or token in row.stop_ids:
                break
        tokens = drawing.new[len(row.new) :]
        self.guessed += len(guesses)
        self.kept += sum(1 for token, guess in zip(tokens, guesses, strict=False) if token == guess)
        return tokens


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in pairs)
