"""A choice's text as its tokens come: what to send now, where each token begins, and where it stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import NewToken
from lightlm.generate.text import TextStream

FinishReason = Literal["stop", "length"]  # of OpenAI's API, where a full context is a length, too


@dataclass(frozen=True)
class TextToken:
    """A token with the number of characters before it, and log-probabilities if they were asked for."""

    token: NewToken
    offset: int


@dataclass(frozen=True)
class Piece:
    """The next part of a choice.

    Args:
        text: what to append.
        tokens: those that begin in the text.
        taken: how many tokens the choice has until now, without a stop token.
        finish_reason: why the choice ended with this part, or None.
    """

    text: str
    tokens: tuple[TextToken, ...] = ()
    taken: int = 0
    finish_reason: FinishReason | None = None


class ChoiceText:
    """The text of one choice.

    Text that may be the beginning of a stop text waits until that is known; so do tokens that end inside a character.

    Args:
        prompt_ids: the tokens before the choice.
        stops: texts that end the choice; none of them is part of it.
        free_tokens: in the text of so many tokens, stop texts are not looked for.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str] = (), free_tokens: int = 0
    ) -> None:
        self._stream = TextStream(tokenizer, prompt_ids, stops, free_tokens)
        self._whole = TextStream(tokenizer, prompt_ids)  # also what waits: where each token begins
        self._taken = self._sent = self._decoded = 0  # tokens, and characters of both streams
        self._tokens: list[TextToken] = []  # since the last piece

    def take(self, token: NewToken) -> Piece | None:
        """Return the part that this token completes, or None if all of its text waits."""
        text, reason = "", token.finish_reason
        if reason != "stop":
            self._taken += 1
            self._tokens.append(TextToken(token, self._decoded))
            self._decoded += len(self._whole.push(token.id))
            text = self._stream.push(token.id)
        if reason is not None:
            text += self._stream.flush()
        self._sent += len(text)
        if self._stream.stop is not None or reason is not None:
            stopped = self._stream.stop is not None
            told = [each for each in self._tokens if not stopped or each.offset < self._sent]
            return Piece(text, tuple(told), self._taken, "stop" if stopped or reason == "stop" else "length")
        if not text:
            return None
        # A token that begins in text that waits belongs to the part that has its text.
        told = [each for each in self._tokens if each.offset < self._sent]
        self._tokens = self._tokens[len(told) :]
        return Piece(text, tuple(told), self._taken)
