"""Turn the fields of a request into questions for the decoding loop."""

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightlm.checkpoint import LoadedModel
from lightlm.errors import LightLMError
from lightlm.generate.prompts import encode_chat, encode_prompt
from lightlm.generate.settings import Settings
from lightlm.generate.text_batch import Question
from lightlm.serve.errors import RequestError
from lightlm.serve.fields import Body, ChatBody, CompletionBody


@dataclass(frozen=True)
class TextRequest:
    """A request for text, ready for the loop.

    Args:
        questions: one per choice, all of the first prompt before those of the next.
        prompt_tokens: of all prompts, each once.
        echoes: what each choice repeats before its text.
    """

    questions: list[Question]
    prompt_tokens: int
    echoes: list[str]


class Reader:
    """Turns requests into questions for one model. Its methods raise RequestError; any thread may call them.

    Args:
        choices: the most that one request may ask for.
        reference: another name for the model, which requests may use.
    """

    def __init__(self, loaded: LoadedModel, choices: int, reference: str | None = None) -> None:
        self._choices, self._reference = choices, reference
        self.name, self.context = loaded.name, loaded.model.config.max_seq_len
        self._tokenizer = loaded.tokenizer
        # A table may have fewer rows than the tokenizer has entries.
        self._ids = min(loaded.tokenizer.vocab_size, loaded.model.config.vocab_size)
        self.chats = "chat_template" in loaded.tokenizer.settings  # whether the model answers messages

    def completion(self, body: CompletionBody) -> TextRequest:
        """Return what a body of /v1/completions asks."""
        self.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise RequestError("echo with logprobs is not supported; `lightlm eval` scores texts", param="echo")
        self._check_choices(len(body.prompts) * body.n)
        prompts = [
            self._encode(given, body.parse_special) if isinstance(given, str) else self._fitting(given, "prompt")
            for given in body.prompts
        ]
        texts = [given if isinstance(given, str) else self._tokenizer.decode(given) for given in body.prompts]
        echoes = [text for text in texts for _ in range(body.n)] if body.echo else []
        return self._request(body, prompts, body.max_tokens, body.logprobs, echoes)

    def chat(self, body: ChatBody) -> TextRequest:
        """Return what a body of /v1/chat/completions asks."""
        self.check_model(body.model)
        if not self.chats:
            raise RequestError("this model has no chat template; use /v1/completions", code="no_chat_template")
        self._check_choices(body.n)
        messages = [{"role": each.role, "content": each.text, "name": each.name} for each in body.messages]
        tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = body.top_logprobs if body.logprobs else None
        with _named("messages"):
            for each in body.messages:
                f"{each.role}{each.text}{each.name}".encode()
            _, ids = encode_chat(self._tokenizer, messages, parse_special=body.parse_special)
        return self._request(body, [self._fitting(ids, "messages")], tokens, logprobs, [])

    def check_model(self, name: str | None) -> None:
        """Raise RequestError unless this is a name of the model, or none is given."""
        if name is not None and name not in (self.name, self._reference):
            message = f"there is no model {name[:80]!r} here; this server has {self.name}"
            raise RequestError(message, 404, "model", "model_not_found")

    def _check_choices(self, count: int) -> None:
        """Raise RequestError if there are too many, before time and memory are spent on each."""
        if count > self._choices:
            message = f"{count} choices in one request; this server takes at most {self._choices}"
            raise RequestError(message, param="n")

    def _request(
        self, body: Body, prompts: Sequence[list[int]], tokens: int | None, logprobs: int | None, echoes: list[str]
    ) -> TextRequest:
        sampling, stops = body.sampling, body.stops
        with _named("logit_bias"):
            sampling.check_ids(self._tokenizer.vocab_size)
        most = self.context if tokens is None else tokens
        if most < sampling.min_new_tokens:
            message = f"min_new_tokens is {sampling.min_new_tokens}, above the {most} tokens that the answer may have"
            raise RequestError(message, param="min_new_tokens")
        seed = secrets.randbits(63) if body.seed is None else body.seed
        settings = Settings(sampling, most, seed, stops)
        # 0 alternatives ask for the token's own probability all the same.
        told = 0 if logprobs is None else max(logprobs, 1)
        # Numbered as `lightlm.generate` numbers the rows of several prompts and samples.
        rows = enumerate(ids for ids in prompts for _ in range(body.n))
        questions = [Question(ids, settings, number, told) for number, ids in rows]
        return TextRequest(questions, sum(map(len, prompts)), echoes)

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        with _named("prompt"):
            text.encode()
            return self._fitting(encode_prompt(self._tokenizer, text, parse_special=parse_special), "prompt")

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        if wrong := [index for index in ids if not 0 <= index < self._ids]:
            message = f"{param}: {str(wrong[0])[:40]} is not a token id of this model; they are below {self._ids:,}"
            raise RequestError(message, param=param)
        if len(ids) > self.context:
            message = f"the prompt has {len(ids):,} tokens, the model's context holds {self.context:,}; shorten it"
            raise RequestError(message, param=param, code="context_length_exceeded")
        return ids


@contextlib.contextmanager
def _named(param: str) -> Iterator[None]:
    """Context manager that turns an error about a field into the answer that names it."""
    try:
        yield
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise RequestError(f"{param}: the text is not Unicode: {error.reason}", param=param) from None
    except LightLMError as error:
        raise RequestError(f"{param}: {error}", param=param) from None
