"""From the fields of a request to rows of the decoding loop."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from lightlm.checkpoint import LoadedModel
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.batch import Request
from lightlm.serve.errors import RequestError
from lightlm.serve.fields import Body, ChatBody, CompletionBody
from lightlm.serve.text import ChoiceText


@dataclass(frozen=True)
class Question:
    """A request for text, ready for the loop.

    Args:
        rows: one per choice, all of the first prompt before those of the next.
        prompt_tokens: of all prompts, each once.
        echoes: what each choice repeats before its text.
    """

    rows: list[tuple[Request, ChoiceText]]
    prompt_tokens: int
    echoes: list[str]


class Reader:
    """Turns requests into questions for one model. Its methods raise RequestError; any thread may call them."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.name, self.context = loaded.name, loaded.model.config.max_seq_len
        self.chats = False
        self._tokenizer = loaded.tokenizer

    def completion(self, body: CompletionBody) -> Question:
        """Return the question of a body of /v1/completions."""
        self.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise RequestError("echo with logprobs is not supported; `lightlm eval` scores texts", param="echo")
        prompts = [self._encode(given) if isinstance(given, str) else self._checked(given) for given in body.prompts]
        texts = [given if isinstance(given, str) else self._tokenizer.decode(given) for given in body.prompts]
        echoes = [text for text in texts for _ in range(body.n)] if body.echo else []
        return self._question(body, prompts, body.max_tokens, body.logprobs, echoes)

    def chat(self, body: ChatBody) -> Question:
        """Return the question of a body of /v1/chat/completions."""
        self.check_model(body.model)
        raise RequestError("this model has no chat template; use /v1/completions", code="no_chat_template")

    def check_model(self, name: str | None) -> None:
        """Raise RequestError unless this is the model's name, or none is given."""
        if name is not None and name != self.name:
            message = f"there is no model {name[:80]!r} here; this server has {self.name}"
            raise RequestError(message, 404, "model", "model_not_found")

    def _question(
        self, body: Body, prompts: Sequence[list[int]], tokens: int | None, logprobs: int | None, echoes: list[str]
    ) -> Question:
        sampling, stops = body.sampling, body.stops
        try:
            sampling.check_ids(self._tokenizer.vocab_size)
        except UsageError as error:
            raise RequestError(str(error), param="logit_bias") from None
        seed = secrets.randbits(63) if body.seed is None else body.seed
        rows: list[tuple[Request, ChoiceText]] = []
        for ids in [ids for ids in prompts for _ in range(body.n)]:
            request = Request(
                ids=ids,
                max_new_tokens=self.context if tokens is None else tokens,
                sampling=sampling,
                seed=seed,
                sample=len(rows),  # as `lightlm.generate` numbers the rows of several prompts and samples
                stop_ids={self._tokenizer.end_of_text_id},
                # 0 alternatives ask for the token's own probability all the same.
                logprobs=0 if logprobs is None else max(logprobs, 1),
            )
            rows.append((request, ChoiceText(self._tokenizer, stops)))
        return Question(rows, sum(map(len, prompts)), echoes)

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
            ids = self._tokenizer.encode(text) or [self._tokenizer.end_of_text_id]
        except (UnicodeEncodeError, LightLMError) as error:  # half of a surrogate pair, which JSON can spell
            raise RequestError(f"prompt: this text cannot be encoded: {error}", param="prompt") from None
        return self._fitting(ids)

    def _checked(self, ids: list[int]) -> list[int]:
        if wrong := [index for index in ids if not 0 <= index < self._tokenizer.vocab_size]:
            size = self._tokenizer.vocab_size
            raise RequestError(f"prompt: {wrong[0]} is not a token id; they are below {size:,}", param="prompt")
        return self._fitting(ids)

    def _fitting(self, ids: list[int]) -> list[int]:
        if len(ids) > self.context:
            message = f"the prompt has {len(ids):,} tokens, the model's context holds {self.context:,}; shorten it"
            raise RequestError(message, param="prompt", code="context_length_exceeded")
        return ids
