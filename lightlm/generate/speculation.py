"""Speculation: guess several tokens, compute them in one pass, and keep those that plain decoding would have drawn.

A guess is kept if it equals the token that the row draws at its place, from the model's own distribution and with the
row's own random number. So guesses decide how fast a text comes and nothing else: with the same seed, it is the text of
plain decoding (logits differ by rounding). For a guess without a distribution, such as one that is looked up, the
probability of keeping it is that of the rule of Leviathan et al. (arXiv 2211.17192), which is the highest possible. A
draft model guesses with a copy of the row's random generator, so that both models draw with the same random number (see
`draw`).

Shapes: T positions, D hidden size, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightlm.checkpoint import LoadedModel
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.prefill import read
from lightlm.generate.sampling.draw import Row, copy_of, sample
from lightlm.generate.step.fast import forward_of
from lightlm.generate.step.measured import speed_facts
from lightlm.model.transformer import Transformer

_NGRAMS = (3, 2)  # lengths of the endings that `Lookup` searches for, the first found wins


class Pace(Protocol):
    """Decides when to guess, from what has happened (`pace.Pace`)."""

    @property
    def guesses(self) -> bool:
        """Whether to guess next."""

    def note_plain(self) -> None:
        """Note a plain step, which makes one token."""

    def note_round(self, guesses: int, tokens: int) -> None:
        """Note a round of guesses and the tokens that it made."""


class Guesser(Protocol):
    """A source of guesses."""

    @property
    def facts(self) -> Any:
        """What its speed depends on, as JSON."""

    def guess(self, row: Row, count: int) -> list[int]:
        """Return up to `count` tokens that may follow the row's prompt and answer."""


@runtime_checkable
class Follower(Protocol):
    """A source of guesses that needs the states of the model that decodes."""

    def follow(self, row: Row, position: int, states_TD: Tensor) -> None:
        """Take the model's final states of a row's columns from `position` on."""


class Lookup:
    """Guess that the text repeats itself: what followed the last tokens where they occurred before (prompt lookup)."""

    facts = "lookup"

    def __init__(self) -> None:
        self._row: Row | None = None
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the latest occurrence of an n-gram ends, for places so far
        self._read = 0  # ends that are in the table

    def guess(self, row: Row, count: int) -> list[int]:
        """Return the tokens after the latest earlier occurrence of the last 3, or else 2, tokens."""
        if row is not self._row:
            self._row, self._ids, self._after, self._read = row, list(row.prompt), {}, 0
        ids = self._ids
        ids += row.new[len(ids) - len(row.prompt) :]
        for end in range(self._read + 1, len(ids)):
            for size in _NGRAMS:
                if end >= size:
                    self._after[tuple(ids[end - size : end])] = end
        self._read = max(len(ids) - 1, 0)
        for size in _NGRAMS:
            if len(ids) > size and (place := self._after.get(tuple(ids[-size:]))) is not None:
                return ids[place : place + count]
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
        self.facts = speed_facts(model)
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
        guessing = copy_of(row)
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


class Speculation:
    """Guesses for a batch of one row, made only while they pay.

    Args:
        guesser: where guesses come from.
        count: guesses per round.
        pace: decides when to guess.

    Raises:
        UsageError: count is below 1.
    """

    def __init__(self, guesser: Guesser, count: int, pace: Pace) -> None:
        if count < 1:
            raise UsageError(f"speculation needs at least 1 guess per round, got {count}")
        self.pace = pace
        self.guessed = self.kept = 0  # tokens since `take_counts`
        self._guesser, self._count = guesser, count

    def follow(self, row: Row, position: int, states_TD: Tensor) -> None:
        """Tell the guesser the model's final states of the row's columns from `position` on, if it needs them."""
        if isinstance(self._guesser, Follower):
            self._guesser.follow(row, position, states_TD)

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
