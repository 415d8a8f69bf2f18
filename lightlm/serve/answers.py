"""The JSON of answers, whole or in a stream, in the shapes of OpenAI's API.

https://platform.openai.com/docs/api-reference/completions/object
https://platform.openai.com/docs/api-reference/chat/object
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightlm.data.tokenizer import token_text
from lightlm.generate.text_batch import Answer, Piece, TextToken

_LOWEST = -9999.0  # JSON has no minus infinity; OpenAI's API writes this number, too
TokenBytes = Callable[[int], bytes]


@dataclass
class Choice:
    """A choice as far as it is known."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    taken: int = 0  # tokens, those of a stop text included; known at the end
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        if piece.answer is not None:
            self.taken, self.finish_reason = len(piece.answer.ids), finish_reason(piece.answer)


def finish_reason(answer: Answer) -> str:
    """Return why an answer ended in the words of OpenAI's API, where a full context is a length, too."""
    return "stop" if answer.finish_reason == "stop" else "length"


class Completions:
    """Answers of /v1/completions.

    Args:
        logprobs: how many alternatives to tell per token; None leaves log-probabilities out.
    """

    whole = part = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, token_bytes: TokenBytes, logprobs: int | None) -> None:
        self._token_bytes, self._logprobs = token_bytes, logprobs
        self._header = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def answer(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """Return the document of complete choices."""
        made = [
            {"index": i, **self.content(choice.text, choice.tokens), "finish_reason": choice.finish_reason}
            for i, choice in enumerate(choices)
        ]
        usage = self.usage(prompt_tokens, sum(choice.taken for choice in choices))
        return {**self._header, "object": self.whole, "choices": made, "usage": usage}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the document of a part of a choice."""
        reason = None if piece.answer is None else finish_reason(piece.answer)
        choice = {"index": index, **self.delta(piece.text, piece.tokens), "finish_reason": reason}
        return {**self._header, "object": self.part, "choices": [choice]}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the document that begins a choice in a stream, or None."""
        return None

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """Return the document at the end of a stream that counts its tokens."""
        usage = self.usage(prompt_tokens, completion_tokens)
        return {**self._header, "object": self.part, "choices": [], "usage": usage}

    @staticmethod
    def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def content(self, text: str, tokens: Sequence[TextToken]) -> dict[str, Any]:
        """Return the text of a whole choice, and what is told about its tokens."""
        return {"text": text, "logprobs": self._log_probs(tokens)}

    def delta(self, text: str, tokens: Sequence[TextToken]) -> dict[str, Any]:
        """Return a part of the text, likewise."""
        return self.content(text, tokens)

    def _log_probs(self, tokens: Sequence[TextToken]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        scored = [(each.id, *self._scores(each)) for each in tokens]
        return {
            "tokens": [self._name(token) for token, _, _ in scored],
            "token_logprobs": [value for _, value, _ in scored],
            # Also the chosen token, as in OpenAI's API.
            "top_logprobs": [
                {self._name(token): value for token, value in (*top, (chosen, own))} for chosen, own, top in scored
            ],
            "text_offset": [each.offset for each in tokens],
        }

    def _scores(self, token: TextToken) -> tuple[float, list[tuple[int, float]]]:
        """Return a token's log-probability, and the most likely tokens with theirs."""
        assert token.log_probs is not None
        top = token.log_probs.top[: self._logprobs]
        return _finite(token.log_probs.chosen), [(other, _finite(value)) for other, value in top]

    def _name(self, token: int) -> str:
        return token_text(self._token_bytes(token))


class Chats(Completions):
    """Answers of /v1/chat/completions."""

    whole, part = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self, index: int) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return {**self._header, "object": self.part, "choices": [choice]}

    def content(self, text: str, tokens: Sequence[TextToken]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._chat_log_probs(tokens)}

    def delta(self, text: str, tokens: Sequence[TextToken]) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._chat_log_probs(tokens)}

    def _chat_log_probs(self, tokens: Sequence[TextToken]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": [self._chat_token(each) for each in tokens], "refusal": None}

    def _chat_token(self, token: TextToken) -> dict[str, Any]:
        value, top = self._scores(token)
        return {**self._scored(token.id, value), "top_logprobs": [self._scored(*other) for other in top]}

    def _scored(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": value, "bytes": list(self._token_bytes(token))}


def _finite(value: float) -> float:
    return max(value, _LOWEST)
