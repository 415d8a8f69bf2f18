"""A choice's text as its tokens come: what to send now, where each token begins, and where it stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import NewToken
from lightlm.generate.engine import TextStream

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

    Text that may be the beginning of a stop text waits until it is known; so do tokens that end inside a character.

    Args:
        stops: texts that end the choice; none of them is part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = TextStream(tokenizer), stops
        self._taken = 0
        self._sent = 0  # characters
        self._held = ""  # decoded, but may begin a stop text
        self._tokens: list[TextToken] = []  # since the last piece

    def take(self, token: NewToken) -> Piece | None:
        """Return the part that this token completes, or None if all of its text waits."""
        ended = token.finish_reason
        if ended != "stop":
            self._taken += 1
            self._tokens.append(TextToken(token, self._sent + len(self._held)))
            self._held += self._stream.push(token.id)
        if ended is not None:
            self._held += self._stream.flush()
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self._tokens = [token for token in self._tokens if token.offset < self._sent + len(self._held)]
            return self._release(len(self._held), "stop")
        if ended is not None:
            return self._release(len(self._held), "stop" if ended == "stop" else "length")
        count = len(self._held) - _beginning(self._held, self._stops)
        return self._release(count, None) if count else None

    def _release(self, count: int, reason: FinishReason | None) -> Piece:
        text, self._held = self._held[:count], self._held[count:]
        self._sent += count
        # A token that begins in text that waits belongs to the part that has its text.
        now = [token for token in self._tokens if reason or token.offset < self._sent]
        self._tokens = self._tokens[len(now) :]
        return Piece(text, tuple(now), self._taken, reason)


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may begin a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


class TokenBytes:
    """The bytes of each token's text; of a special token, its name's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, token: int) -> bytes:
        name = self._tokenizer.name_of(token)
        if name is None or token in self._tokenizer.special_tokens:
            return (name or "").encode()
        if self._tokenizer.byte_level:
            return bytes(_BYTES[character] for character in name if character in _BYTES)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        return name.removeprefix("##").replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level tokenizers write for one (GPT-2's alphabet)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
