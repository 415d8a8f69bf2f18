"""The fields of a request's body: an allow-list. Each other field is an error, so none is ignored without notice.

Names and meanings are those of OpenAI's API; `min_p`, `top_k` and others that it lacks have the names of `Sampling`.
https://platform.openai.com/docs/api-reference/completions
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lightlm.errors import UsageError
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.names import nearest
from lightlm.serve.errors import RequestError

MAX_CHOICES = 128
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256  # each is looked for after every token
MAX_BIASES = 1024  # applied at every step
MAX_LOGPROBS = 20
DEFAULT_TOKENS = 16  # of /v1/completions, as in OpenAI's API; a chat's answer may fill the context

# Fields that ask for what LightLM does not do -> the values that do not ask for it. `null` never does.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # of no tools
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# The same for messages: clients send answers back with the fields that answers have.
_UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}
AnyBody = TypeVar("AnyBody", bound="Body")

_SETTINGS = tuple(setting.name for setting in fields(Sampling) if setting.name != "logit_bias")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class StreamOptions(_Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False  # padding against eavesdroppers, which LightLM's streams lack


class Body(_Strict):
    """Fields of every request for text. Ranges of the sampling settings are those of `Sampling`."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    parse_special: bool = False  # the characters of a special token in the prompt mean that token
    user: str | None = None  # a name for the caller, which has no effect, like the next four
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] = {}
    prompt_cache_retention: str | None = None
    temperature: float = DEFAULT.temperature
    top_k: int | None = DEFAULT.top_k
    top_p: float = DEFAULT.top_p
    min_p: float = DEFAULT.min_p
    typical_p: float = DEFAULT.typical_p
    repetition_penalty: float = DEFAULT.repetition_penalty
    frequency_penalty: float = DEFAULT.frequency_penalty
    presence_penalty: float = DEFAULT.presence_penalty
    no_repeat_ngram: int = DEFAULT.no_repeat_ngram
    min_new_tokens: int = DEFAULT.min_new_tokens
    logit_bias: dict[str, float] = Field({}, max_length=MAX_BIASES)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            message = f"stop: give at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters"
            raise RequestError(message, param="stop")
        return stops

    @property
    def sampling(self) -> Sampling:
        """The settings of sampling.

        Raises:
            RequestError: a value is out of its range.
        """
        try:
            biases = tuple((int(token), bias) for token, bias in self.logit_bias.items() if _is_index(token))
            if len(biases) < len(self.logit_bias):
                raise UsageError("logit_bias: the names must be token ids")
            return Sampling(**{name: getattr(self, name) for name in _SETTINGS}, logit_bias=biases)
        except UsageError as error:
            param = str(error).split()[0].rstrip(":").replace("-", "_")
            raise RequestError(str(error).replace(param.replace("_", "-"), param), param=param) from None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: Any  # a text, a list of texts, a list of token ids, or a list of such lists
    max_tokens: int = Field(DEFAULT_TOKENS, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, all as texts or all as token ids.

        Raises:
            RequestError: the prompt has another form.
        """
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_id, prompt))):
            prompt = [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(text, str) for text in prompt):
                return prompt
            if all(isinstance(ids, list) and ids and all(map(_is_id, ids)) for ids in prompt):
                return prompt
        raise RequestError(
            "prompt: give a text, a list of texts, a list of token ids, or a list of lists of token ids", param="prompt"
        )


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] = {}  # without effect


class Message(_Strict):
    """A turn of a chat."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        for name, harmless in _UNSUPPORTED_IN_MESSAGES.items():
            if given.get(name) is not None and given[name] not in harmless:
                raise ValueError(f"{name} is not supported")
        return {name: value for name, value in given.items() if name not in _UNSUPPORTED_IN_MESSAGES}


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or its old name max_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


def read(kind: type[AnyBody], document: Any) -> AnyBody:
    """Return the checked body of a request.

    Args:
        document: the parsed JSON.

    Raises:
        RequestError: it is not an object, or a field is unknown, unsupported or wrong; the message names one of them.
    """
    if not isinstance(document, Mapping):
        raise RequestError("the body must be a JSON object")
    for name, value in document.items():
        if name in kind.model_fields:
            continue
        if name in _UNSUPPORTED:
            no_more = (document.get("n"),) if name == "best_of" else ()  # the best n of n
            if value is not None and value not in (*_UNSUPPORTED[name], *no_more):
                raise RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
            continue
        guess = nearest(name, kind.model_fields)
        hint = f"; did you mean {guess}?" if guess else ""
        raise RequestError(f"unknown field {_shown(name)}{hint}", param=name[:80], code="unknown_parameter")
    try:
        return kind(**{name: value for name, value in document.items() if name in kind.model_fields})
    except ValidationError as error:
        # Of a value that has one of several types, the type that fits longest is meant.
        wrong = max(error.errors(include_url=False, include_context=False), key=lambda each: len(each["loc"]))
        place = ".".join(str(part) for part in wrong["loc"] if part not in _BRANCHES)
        message = _MESSAGES.get(wrong["type"]) or wrong["msg"].removeprefix("Value error, ")
        text = f"{place}: {message}" if place else message
        raise RequestError(text, param=place or None) from None


_MESSAGES = {"missing": "is missing", "extra_forbidden": "is an unknown field"}
_BRANCHES = ("str", "list[str]", "list[TextPart]")  # which pydantic adds to the place where a type is a choice


def _shown(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:40] + "...")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10
