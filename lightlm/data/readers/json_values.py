"""JSON that is not one record per line: arrays of records, and records over several lines, read one by one.

Only the record at hand is held, so a file may have any size.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from lightlm.data.readers.recognition import not_utf8
from lightlm.data.readers.texts import CHUNK_BYTES, RECORD_BYTES, too_large
from lightlm.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_TOKEN = 12  # characters that the parser may need to see whole: \ud83d\ude00, -Infinity
_UNTIL_QUOTE = "Unterminated string"  # the parser's message for a string that does not end in the text

_decode = json.JSONDecoder().raw_decode


def is_lines(head: bytes) -> bool:
    """Return whether JSON that begins so has a record per line, rather than an array or records over several lines.

    A first line that is broken in any other way is a mistake in that line.
    """
    lines = [line for line in head.lstrip().split(b"\n", 20) if line.strip()]
    if lines and lines[0].startswith(b"["):
        return False
    if len(lines) < 2 or not lines[0].startswith(b"{") or lines[1].lstrip().startswith((b"{", b"[")):
        return True
    try:
        first = lines[0].decode().rstrip()
        json.loads(first)
    except json.JSONDecodeError as error:
        return error.pos < len(first)
    except (ValueError, RecursionError):
        pass
    return True


def values_of_line(text: str) -> list[Any]:
    """Return the values on a line that holds several, and the items of arrays there; none if one is not JSON."""
    found: list[Any] = []
    at = _skip_space(text, 0)
    try:
        while at < len(text):
            value, at = _decode(text, at)
            found += value if isinstance(value, list) else [value]
            at = _skip_space(text, at)
    except (ValueError, RecursionError):
        return []
    return found


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


class JsonValues:
    """The values of a stream of UTF-8, and the items of its arrays; iterate once."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        """`name` is that of the file, for messages."""
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._counted, self._line = 0, 1  # the line at character `_counted`
        self._failure: DataError | None = None  # raised where the text before it is used up
        self._ended = False

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield the place ("FILE, line N") and the value of each. Raises DataError for what is not JSON."""
        while (character := self._next()) is not None:
            if character == "[":
                yield from self._items()
            else:
                yield self._value()

    def _items(self) -> Iterator[tuple[str, Any]]:
        opened = self._place()
        self._at += 1
        while (character := self._next()) != "]":
            if character is None:
                raise DataError(f"{opened}: not valid JSON (the array that begins here has no end)")
            yield self._value()
            if (character := self._next()) == ",":
                self._at += 1
            elif character is not None and character != "]":
                raise DataError(f"{self._place()}: not valid JSON (a comma or ] was expected)")
        self._at += 1

    def _value(self) -> tuple[str, Any]:
        place = self._place()
        while True:
            try:
                value, self._at = _decode(self._text, self._at)
                return place, value
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith(_UNTIL_QUOTE) or error.pos > len(self._text) - _LONGEST_TOKEN
                if len(self._text) - self._at > RECORD_BYTES:
                    raise too_large(place, "JSON") from None
                if not unfinished or not self._more():
                    self._at = self._at if unfinished else error.pos
                    raise DataError(f"{self._place()}: not valid JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:  # thousands of digits, or of nested brackets
                raise DataError(f"{place}: not valid JSON ({error})") from error

    def _next(self) -> str | None:
        """Skip white space; return the character after it, None at the end."""
        while True:
            self._at = _skip_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return None

    def _place(self) -> str:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return f"{self._name}, line {self._line}"

    def _more(self) -> bool:
        """Read on: as much as is held and not used, so that a large value is parsed a few times only."""
        if self._failure is not None:
            raise self._failure
        if self._ended:
            return False
        self._place()
        rest = self._text[self._at :]
        data = self._stream.read(max(CHUNK_BYTES, len(rest)))
        self._ended = not data
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode()
            bytes_around = error.object[max(0, error.start - 1000) : error.start + 1000]
            line = self._line + rest.count("\n") + text.count("\n")
            self._failure = not_utf8(f"{self._name}, line {line}", bytes_around, error.object[error.start], "in it")
        self._text, self._at, self._counted = rest + text, 0, 0
        return bool(text) or self._failure is not None or not self._ended
