"""A conversation as tokens, and which of them are trained on: the assistant's, with the end of each turn.

Which part of the rendered text is an answer, is found in one of three ways:

1. The template marks answers with {% generation %}.
2. An answer is what the conversation up to its message adds to the prompt that a model would be given for it.
3. Where a template writes earlier messages otherwise once others follow, the contents are marked before rendering.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from lightlm.data.chat.conversation import Message
from lightlm.data.chat.template import (
    ANSWER_BEGINS,
    ANSWER_ENDS,
    ChatTemplate,
    parts_of,
    without_marks,
)
from lightlm.data.shards import MASK_BEGINS, MASK_TRAINED, TrainOn
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import DataError, LightLMError

Span = tuple[int, int]  # characters of a rendered text


class Encoded(NamedTuple):
    """A conversation: its text, token ids, and a byte per token (see `lightlm.data.shards.MASK_TRAINED`)."""

    text: str
    ids: np.ndarray
    masks: np.ndarray


class ConversationEncoder:
    """Writes conversations with a tokenizer's chat template, and encodes them.

    Special tokens that a message spells are ordinary characters.
    """

    def __init__(self, tokenizer: Tokenizer, train_on: TrainOn) -> None:
        """Raises DataError for a template that is not valid."""
        self._tokenizer, self._train_on = tokenizer, train_on
        try:
            self._template = ChatTemplate.of(tokenizer)
        except LightLMError as error:
            raise DataError(str(error)) from error
        self._specials = tuple(filter(None, tokenizer.special_tokens.values()))

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Return a conversation as text, tokens and masks.

        Raises DataError where the template does not take the messages, or does not show where the answers are.
        """
        try:
            text, spans = self._rendered(messages)
        except LightLMError as error:
            raise DataError(str(error)) from error
        ids: list[int] = []
        places: list[Span] = []
        for start, part, is_plain in parts_of(text):
            found, offsets = self._tokenizer.encode_with_places(part, special=not is_plain)
            ids += found
            places += [(start + begin, start + end) for begin, end in offsets]
        masks = np.zeros(len(ids), np.uint8)
        begins, ends = np.array(places, np.int64).reshape(-1, 2).T
        for start, end in spans:
            masks[(ends > start) & (begins < end)] = MASK_TRAINED
        masks[:1] = MASK_BEGINS  # and nothing comes before it to predict it from
        if not (masks & MASK_TRAINED).any():
            raise DataError("no token of the assistant is left in what the chat template writes")
        return Encoded(without_marks(text), np.array(ids, np.int64), masks)

    def _rendered(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the text with the marks of `parts_of`, and the spans to train on."""
        text, spans = _without_answer_marks(self._render(messages))
        if self._train_on == "all":
            return text, [(0, len(text))]
        found = spans or self._by_prefixes(messages, text) or self._by_contents(messages, text)
        if not found:
            raise DataError(
                "the chat template does not show where the assistant's answers are; put {% generation %} and "
                "{% endgeneration %} around them"
            )
        return text, found[-1:] if self._train_on == "last" else found

    def _render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        return self._template.marked(messages, plain=self._tokenizer.special_pattern, answer=answer)

    def _by_prefixes(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        """Return the answers by what each adds to its prompt; None where a prompt is not how the text begins."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not number:
                return None
            try:
                prompt = self._render(messages[:number], answer=True)
                so_far = self._render(messages[: number + 1])
            except LightLMError:  # a template may refuse a part of a conversation
                return None
            if not text.startswith(prompt):
                return None
            end = len(so_far)
            if not text.startswith(so_far):  # it may only lack an end that the last message has
                end = next(n for n, pair in enumerate(zip_longest(so_far, text)) if pair[0] != pair[1])
                tokens = self._tokenizer.special_pattern.finditer(text, len(prompt))
                end = next((token.start() for token in tokens if token.start() < end < token.end()), end)
            if message["content"].strip() not in without_marks(text[len(prompt) : end]):
                return None
            spans.append((len(prompt), self._turn_end(text, len(prompt), end)))
        return spans

    def _by_contents(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        """Return where the answers' contents are; None where marks around them change the rest of the text."""
        marked = []
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                before, stripped = content[: len(content) - len(content.lstrip())], content.strip()
                after = content[len(before) + len(stripped) :]
                content = f"{before}{ANSWER_BEGINS}{stripped}{ANSWER_ENDS}{after}"
            marked.append(message | {"content": content})
        found, spans = _without_answer_marks(self._render(marked))
        if found != text:
            return None
        return [(start, self._turn_end(text, start, self._special_after(text, end))) for start, end in spans]

    def _special_after(self, text: str, end: int) -> int:
        """Return the end of the special token after a content and white space, or the end of the content."""
        at = end + len(text[end:]) - len(text[end:].lstrip())
        return max((at + len(name) for name in self._specials if text.startswith(name, at)), default=end)

    def _turn_end(self, text: str, start: int, end: int) -> int:
        """Return the end of a turn without the white space after its end-of-turn token."""
        visible = start + len(text[start:end].rstrip())
        return visible if text[start:visible].endswith(self._specials or ("\0",)) else end


def _without_answer_marks(text: str) -> tuple[str, list[Span]]:
    """Return a rendered text without the marks around answers, and where these were."""
    if ANSWER_BEGINS not in text:
        return text, []
    pieces = list(_pieces(text))
    spans, at, begins = [], 0, None
    for piece, mark in pieces:
        at += len(piece)
        if mark == ANSWER_BEGINS:
            begins = at
        elif mark == ANSWER_ENDS and begins is not None:
            spans.append((begins, at))
            begins = None
    return "".join(piece for piece, _ in pieces), [span for span in spans if span[0] < span[1]]


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Yield the text between marks, each piece with the mark after it."""
    at = 0
    for place, character in enumerate(text):
        if character in (ANSWER_BEGINS, ANSWER_ENDS):
            yield text[at:place], character
            at = place + 1
    yield text[at:], ""
