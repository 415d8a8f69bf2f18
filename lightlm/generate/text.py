"""Turn generated tokens into text: as they come, without splitting characters, up to a stop string."""

from collections.abc import Sequence
from itertools import zip_longest

from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import UsageError


class TextStream:
    """Turn an answer's tokens into text as they come.

    All pieces joined are what decoding prompt and answer together adds to decoding the prompt. Decoded by itself, an
    answer lacks its first space with a sentencepiece vocabulary. One character may take several tokens: those that end
    inside a character (they decode to a trailing U+FFFD) wait for the rest of it or for `flush`.

    A stop string ends the text. It is never returned, and text that may be the beginning of one waits until that is
    known. Special tokens are not part of the text, but a stop string may spell them.

    Args:
        prompt_ids: the tokens before the answer.
        stops: the stop strings.
        free_tokens: in the text of so many tokens, stop strings are not looked for.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), stops: Sequence[str] = (), free_tokens: int = 0
    ) -> None:
        if "" in stops:
            raise UsageError("a stop string is empty; leave it out")
        self.stop: str | None = None  # the stop string that ended the text
        self.decoded = 0  # characters of the text so far, with those that wait: where the next token's text begins
        self._tokenizer, self._stops, self._free_tokens = tokenizer, stops, free_tokens
        self._context = list(prompt_ids)  # decoded before the tokens that follow
        self._known = tokenizer.decode(self._context)
        self._pending: list[int] = []
        # Characters not returned yet, and whether each is part of the text or of a special token's name.
        self._held, self._visible = "", list[bool]()

    def push(self, token: int) -> str:
        """Return the text that this token completes; it may be empty."""
        if self.stop is not None:
            return ""
        self._pending.append(token)
        if self._free_tokens:
            self._free_tokens -= 1
            return self._decode(whole=True)
        self._hold(self._decode(whole=True), visible=True)
        if self._stops:
            self._hold(self._tokenizer.special_tokens.get(token, ""), visible=False)
        return self._release(final=False)

    def flush(self) -> str:
        """Return the text still waiting, after the last token."""
        if self.stop is not None:
            return ""
        self._hold(self._decode(whole=False), visible=True)
        return self._release(final=True)

    def _decode(self, *, whole: bool) -> str:
        together = self._tokenizer.decode(self._context + self._pending)
        text = together[_shared(self._known, together) :]
        if not text or (whole and text.endswith("\ufffd")):
            return ""
        self._context, self._pending = self._pending, []
        self.decoded += len(text)
        self._known = self._tokenizer.decode(self._context)
        return text

    def _hold(self, text: str, *, visible: bool) -> None:
        self._held += text
        self._visible += [visible] * len(text)

    def _release(self, *, final: bool) -> str:
        """Return the text up to a stop string or the beginning of one; all of it if it is `final`."""
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            end, self.stop = min(found, key=lambda match: match[0])
        else:
            end = len(self._held) - (0 if final else self._beginning())
        text = "".join(
            character for character, visible in zip(self._held[:end], self._visible, strict=False) if visible
        )
        self._held, self._visible = self._held[end:], self._visible[end:]
        return text

    def _beginning(self) -> int:
        """Return the length of the longest beginning of a stop string with which the text ends."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        return next(
            (
                count
                for count in range(min(longest, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-count:]) for stop in self._stops)
            ),
            0,
        )


def _shared(first: str, second: str) -> int:
    """Return the number of characters with which both texts begin.

    A context that ends inside a character decodes otherwise once the rest of the character follows.
    """
    if second.startswith(first):
        return len(first)
    return next(place for place, pair in enumerate(zip_longest(first, second)) if pair[0] != pair[1])


def text_of(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """Return the text of an answer, as a `TextStream` gives it in pieces."""
    stream = TextStream(tokenizer, prompt_ids, stops)
    return "".join([*map(stream.push, ids), stream.flush()])
