"""Conversations: how records of data sets write them, and how they pass through preparation as texts.

A form is a row of `FORMS`. Roles are those of chat templates; other names for them are rows of `ROLES`.
"""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightlm.data.shards import TrainOn
from lightlm.errors import DataError, UsageError

Message = dict[str, str]  # with the keys `role` and `content`
Record = Mapping[str, Any]

ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "developer": "system", "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython")

# Before a role and before a content, where a conversation is one text. Unicode reserves them for a program's inside.
_ROLE, _CONTENT = "\ufdd2", "\ufdd3"
_RESERVED = re.compile("[\ufdd0-\ufdd5]")  # also those that mark parts of a rendered conversation


SYSTEM = "system"


@dataclass(frozen=True)
class Form:
    """A way to write a conversation.

    Attributes:
        needs: the columns by which a record is known to have it.
        read: the messages of a record, not checked yet.
        may: further columns that it reads; `SYSTEM` is a message before the others.
        refuses: columns that would change the conversation: a record in which one is not empty is an error.
    """

    needs: tuple[str, ...]
    read: Callable[[Record], Any]
    may: tuple[str, ...] = (SYSTEM,)
    refuses: tuple[str, ...] = ("tools",)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.needs, *self.may, *self.refuses)


def _of_prompt(record: Record) -> list[Any]:
    sides: list[Any] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        parsed = _parsed(value)  # in CSV, a list of messages is JSON; other JSON is what somebody wrote
        if isinstance(parsed, list) and parsed and all(map(_is_message, parsed)):
            value = parsed
        sides += value if isinstance(value, list) else [{"role": role, "content": value}]
    return sides


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def _of_instruction(record: Record) -> list[Any]:
    question, more = record["instruction"], record.get("input")
    if isinstance(question, str) and isinstance(more, str) and more.strip():
        question = f"{question}\n\n{more}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


FORMS = {
    "messages": Form(("messages",), lambda record: record["messages"]),
    "sharegpt": Form(("conversations",), lambda record: record["conversations"]),
    "prompt": Form(("prompt", "completion"), _of_prompt),
    "alpaca": Form(("instruction", "output"), _of_instruction, (SYSTEM, "input"), ("tools", "history")),
}
CHAT = "chat"  # whichever form a record has


class ChatColumns(str):
    """What stands for a text column's name: `chat` or the name of a form, and with `:COLUMN` the messages' column.

    A record with it is read as a conversation. `train_on` says whose weights count.
    """

    train_on: TrainOn

    def __new__(cls, form: str, train_on: TrainOn = "assistant") -> "ChatColumns":
        columns = super().__new__(cls, form)
        columns.train_on = train_on
        return columns

    @property
    def column(self) -> str:
        """The column that the user named, or an empty text."""
        return self.partition(":")[2]

    @property
    def _forms(self) -> dict[str, Form]:
        """The forms that a record may have."""
        name = self.partition(":")[0]
        if self.column:
            column = self.column
            return {name: Form((column.partition(".")[0],), lambda record: _field(record, column))}
        return FORMS if name == CHAT else {name: FORMS[name]}

    @property
    def columns(self) -> list[str]:
        """All columns that a form looks at."""
        return list(dict.fromkeys(name for form in self._forms.values() for name in form.columns))

    def found_in(self, columns: Collection[str]) -> bool:
        """Return whether a record with these columns is a conversation."""
        return bool(self._having(columns))

    @property
    def wanted(self) -> str:
        """The columns of the forms, for messages."""
        return ", or ".join(" and ".join(form.needs) for form in self._forms.values())

    def text_of(self, record: Record, where: Callable[[], str]) -> str | None:
        """Return a record's conversation as a text (see `as_text`), None for a null. Raises DataError naming it."""
        if not (forms := self._having(record)):
            raise self.missing(where(), list(map(str, record)))
        # A table has the columns of every form, and nulls in those of the others.
        form = next((form for form in forms if any(record[name] is not None for name in form.needs)), None)
        if form is None:
            return None
        for name in form.refuses:
            if _parsed(record.get(name)):
                raise DataError(f"{where()}: the conversation has {name}, which LightLM does not read")
        messages = check_conversation(form.read(record), where, self.train_on)
        system = record.get(SYSTEM)
        if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return as_text(messages)

    def missing(self, where: str, columns: list[str]) -> DataError:
        """Return the error for a record that has no form."""
        return DataError(
            f"{where}: no conversation: the columns {self.wanted} were expected; there are: "
            f"{', '.join(columns[:30]) or 'none'}. Rename them, or name the one with the messages: --text-column NAME"
        )

    def _having(self, columns: Collection[str]) -> list[Form]:
        return [form for form in self._forms.values() if all(name in columns for name in form.needs)]


def columns_of(form: str, text_column: str, train_on: TrainOn) -> str:
    """Return what to read of a record: the text column for the form `text`, else its conversation.

    `form` is also `CHAT` or a row of `FORMS`; `text_column` may then name the column with the messages. Raises
    UsageError for another form, and for a column of a form that has no messages.
    """
    if form == "text":
        return text_column
    if form not in (CHAT, *FORMS):
        raise UsageError(f"the format {form!r} is unknown; known are {', '.join(('text', CHAT, *FORMS))}")
    columns = FORMS[form].needs if form in FORMS else ()
    if text_column != "text" and len(columns) > 1:
        raise UsageError(f"--text-column names the messages, but {form} reads {' and '.join(columns)}; leave it out")
    return ChatColumns(form if text_column == "text" else f"{form}:{text_column}", train_on)


def _field(record: Any, column: str) -> Any:
    for part in column.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def _parsed(value: Any) -> Any:
    """Return what the JSON in a text says: in CSV, a list can only be written so. Anything else is left as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def check_conversation(given: Any, where: Callable[[], str], train_on: TrainOn = "assistant") -> list[Message]:
    """Return messages with the roles of chat templates and texts as contents.

    Raises DataError, which begins with `where()`, for what is not a conversation to learn answers from.
    """
    given = _parsed(given)
    if not isinstance(given, list) or not given:
        raise DataError(f"{where()}: a list of messages was expected, with role and content")
    messages = []
    for number, message in enumerate(given, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"{where()}: message {number} is not an object with role and content")
        named = message.get("role") or message.get("from")
        name = named.strip().lower() if isinstance(named, str) else ""
        if name in _TOOL_ROLES or message.get("tool_calls"):
            raise DataError(f"{where()}: message {number} uses a tool; conversations with tools are not read")
        if name not in ROLES:
            raise DataError(f"{where()}: message {number} has the unknown role {named!r}; known are {', '.join(ROLES)}")
        role = ROLES[name]
        weighs = role == "assistant" or train_on == "all"
        if weighs and (weight := message.get("weight")) not in (None, 1):
            every = "answer" if role == "assistant" else "message"
            raise DataError(
                f"{where()}: message {number} has the weight {weight!r}, but every {every} weighs the same with "
                f"--train-on {train_on}"
            )
        content = _text_of_content(message.get("value") if message.get("content") is None else message["content"])
        if content is None:
            raise DataError(f"{where()}: message {number} ({role}) holds no text")
        if not content.strip():
            raise DataError(f"{where()}: message {number} ({role}) is empty")
        messages.append({"role": role, "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{where()}: the conversation has no message of an assistant to learn from")
    return messages


def _text_of_content(content: Any) -> str | None:
    """Return a content that is a text, or a list of parts that are texts; None for anything else."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else None


def as_text(messages: list[Message]) -> str:
    """Return a conversation as one text, which is compared, split and counted like any document."""
    return "".join(f"{_ROLE}{message['role']}{_CONTENT}{_RESERVED.sub('', message['content'])}" for message in messages)


def from_text(text: str) -> list[Message]:
    """Return the messages of `as_text`."""
    halves = (part.partition(_CONTENT) for part in text.split(_ROLE)[1:])
    return [{"role": role, "content": content} for role, _, content in halves]


def contents_of(text: str) -> str:
    """Return the contents of the messages of `as_text`, a line each: what people wrote."""
    return "\n".join(message["content"] for message in from_text(text))
