"""The lines of `lightlm generate --jsonl`. Imports no torch, so mistakes in them are reported at once."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightlm.cli.generate.input import NO_CONVERSATION, checked, decoded
from lightlm.data.chat.template import checked_messages
from lightlm.errors import DataError, UsageError
from lightlm.generate.settings import Settings

_SHOWN = 5  # mistakes that a message lists


@dataclass(frozen=True)
class Row:
    """One line of the input."""

    line: int  # from 1
    id: str | int | None
    prompt: str | None
    messages: list[dict[str, Any]] | None
    settings: Settings


def read_rows(path: Path, settings: Settings, *, chat: bool, system: str | None) -> list[Row]:
    """Return the rows of a file of JSON objects; blank lines are none.

    A row's seed is its own, else that of `settings` plus the rows before it, so that equal prompts are answered
    differently.

    Args:
        chat: a prompt is a user's message.
        system: the system's message of each conversation without one.

    Raises:
        DataError: the file cannot be read, or has lines that are not such rows; the message lists them.
    """
    try:
        text = decoded(sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())
    except OSError as error:
        raise DataError(f"--jsonl {path} cannot be read: {error.strerror}") from None
    rows, wrong = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            seeded = replace(settings, seed=settings.seed + number - 1)
            rows.append(_row(number, line, seeded, chat=chat, system=system))
        except UsageError as error:
            wrong.append(f"{path}:{number}: {error}")
    refuse(wrong)
    if not rows:
        raise DataError(f"--jsonl {path} has no lines")
    return rows


def _row(number: int, line: str, settings: Settings, *, chat: bool, system: str | None) -> Row:
    try:
        values = json.loads(checked(line, "the line", "save the file as UTF-8"))
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(error.object[error.start]):04x}"
        raise UsageError(f"{escape} is half of a character; JSON writes the two halves as \\ud83d\\ude42") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError('not an object such as {"prompt": "Once"}')
    name, prompt, messages = (values.pop(key, None) for key in ("id", "prompt", "messages"))
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        raise UsageError("id must be a text or a whole number")
    if (prompt is None) == (messages is None):
        raise UsageError("one of prompt and messages must be there")
    if messages is not None:
        messages = checked_messages(messages)
    elif not isinstance(prompt, str):
        raise UsageError("prompt must be a text")
    elif chat:
        prompt, messages = None, [{"role": "user", "content": prompt}]
    elif system is not None:
        raise UsageError(NO_CONVERSATION)
    if messages is not None and system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Row(number, name, prompt, messages, settings.changed(values))


def refuse(wrong: Sequence[str]) -> None:
    """Raise DataError if there are mistakes, each a line; the message has the first ones."""
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
        raise DataError("\n".join(wrong[:_SHOWN]) + more)
