"""Chat templates: how a model expects a conversation to be written.

A template is a program in Jinja that comes with a model from anywhere, so it runs in a sandbox: it sees the messages,
the names of the special tokens and a few functions, and reaches nothing else. Its steps, and the texts and numbers
that it makes, are bounded (see `lightlm.data.chat.sandbox`).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightlm.data.chat.conversation import SYSTEM
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import LightLMError, UsageError

if TYPE_CHECKING:
    from jinja2 import Template

# Around characters that are to be read as plain text. Unicode reserves both for a program's inside.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
# Around what a template marks as the answer with {% generation %}.
ANSWER_BEGINS, ANSWER_ENDS = "\ufdd4", "\ufdd5"
_ENDS_HERE = "\ufdd6"  # after the message that an answer continues
_ANSWER_MARKS = str.maketrans("", "", ANSWER_BEGINS + ANSWER_ENDS)

# ChatML, for tokenizers without a template of their own. llama.cpp and Ollama recognize it.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>' ~ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What a template may call; the other functions that Jinja offers are of no use in one.
_GLOBALS = ("range", "namespace")


class ChatTemplate:
    """Write conversations as one model expects them.

    Args:
        source: the template, in Jinja as transformers reads it.
        special_tokens: what the template may call `bos_token`, `eos_token` and so on.

    Raises:
        LightLMError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _compiled(source)
        self._special_tokens = special_tokens

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Return the template of a tokenizer's model. Raises UsageError if it has none."""
        source = tokenizer.settings.get("chat_template")
        if source is None:
            raise UsageError(
                "the model has no chat template: it continues texts and knows no turns; give it a prompt, without "
                "--chat or messages"
            )
        roles = {key: value for key, value in tokenizer.settings.items() if key.endswith("_token")}
        return cls(source, {role: token for role, token in roles.items() if isinstance(token, str)})

    def render(
        self, messages: Sequence[dict[str, Any]], *, plain: re.Pattern[str] | None = None, answer: bool = True
    ) -> str:
        """Return the text of a conversation; see `marked`."""
        return self.marked(messages, plain=plain, answer=answer).translate(_ANSWER_MARKS)

    def marked(
        self, messages: Sequence[dict[str, Any]], *, plain: re.Pattern[str] | None = None, answer: bool = True
    ) -> str:
        """Return the text of a conversation, with `ANSWER_BEGINS` and `ANSWER_ENDS` where the template marks answers.

        Args:
            messages: each with `role` and `content`; see `checked_messages`.
            plain: what to put between marks in messages, see `parts_of`; None marks nothing.
            answer: whether the beginning of the model's answer follows.

        Raises:
            UsageError: a message is malformed.
            LightLMError: the template refuses the messages, or fails.
        """
        messages = checked_messages(messages)
        given: Any = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if plain is not None:
            given = _marked(given, plain)
        from lightlm.data.chat.sandbox import render_bounded

        try:
            return render_bounded(
                self._template,
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=answer,
                **self._special_tokens,
            )
        except Exception as error:  # whatever a template does wrong
            kind = (
                "" if type(error).__name__ in ("TemplateError", "TemplateRuntimeError") else f"{type(error).__name__}: "
            )
            raise LightLMError(f"the model's chat template does not take these messages: {kind}{error}") from None

    def render_begun(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the text of a conversation up to the end of its last message, which the model continues.

        Raises:
            UsageError: a message is malformed.
            LightLMError: the template refuses the messages, fails, or does not write the last message.
        """
        messages = checked_messages(messages)
        last = messages[-1]
        marked = [*messages[:-1], last | {"content": f"{last['content']}{_ENDS_HERE} "}]
        text, mark, after = self.render(marked, answer=False).partition(_ENDS_HERE)
        if not mark:
            raise LightLMError("the model's chat template does not write the message that is to be continued")
        return text if after.startswith(" ") else text.rstrip()  # a template that trims contents trims this one


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages with the role `system` in place of `developer`, as in training data.

    Raises UsageError unless they are a list of objects with the texts `role` and `content`.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError('messages is not a list such as [{"role": "user", "content": "Hello"}]')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise UsageError(f'message {number} is not an object such as {{"role": "user", "content": "Hello"}}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UsageError(f"message {number}: {key} is missing or not a text")
    return [each | {"role": SYSTEM} if each["role"] == "developer" else each for each in messages]


def parts_of(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the parts of a rendered conversation: (place, text, whether it is plain text and holds no special tokens).

    The marks of `render` are not part of them.
    """
    at = 0
    for match in _MARKED.finditer(text):
        if match.start() > at:
            yield at, text[at : match.start()], False
        if match[1]:
            yield match.start(1), match[1], True
        at = match.end()
    if at < len(text):
        yield at, text[at:], False


def without_marks(text: str) -> str:
    """Return a rendered conversation as it reads, without the marks of `render`."""
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _marked(value: Any, plain: re.Pattern[str]) -> Any:
    """Return messages in which each match of `plain` stands between marks."""
    if isinstance(value, str):
        return plain.sub(lambda match: f"{_OPEN}{match[0]}{_CLOSE}", without_marks(value))
    if isinstance(value, dict):
        return {key: _marked(inner, plain) for key, inner in value.items()}
    return [_marked(inner, plain) for inner in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    """Compile a template for the variables and functions that transformers gives it."""
    from jinja2 import TemplateError, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols

    from lightlm.data.chat.sandbox import BoundedEnvironment

    class Generation(Extension):
        """The tag around an answer, which marks it for training on it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            begins, ends = (
                nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (ANSWER_BEGINS, ANSWER_ENDS)
            )
            return [begins, *parser.parse_statements(("name:endgeneration",), drop_needle=True), ends]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def as_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals = {name: environment.globals[name] for name in _GLOBALS} | {
        "dict": lambda *values, **named: dict(*values, **named),  # the class itself has more than a template needs
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.filters["tojson"] = as_json  # Jinja's own escapes characters for HTML
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise LightLMError(f"the model's chat template is not valid in line {error.lineno}: {error.message}") from None
