"""The values of a sweep on the command line: `key=a,b,c`, `key=low..high`, `2h`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightlm.errors import UsageError

_CLOSING = {"[": "]", "{": "}"}
_NUMBER = r"[-+]?\d[\d_]*(?:\.\d+)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_DECADE = 10.0  # a range whose ends differ by more than this factor is searched on a logarithmic scale
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)", re.IGNORECASE)
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True)
class Range:
    """Numbers that a search draws from, both ends included."""

    low: float
    high: float
    whole: bool  # whole numbers only

    @property
    def logarithmic(self) -> bool:
        return self.low > 0 and self.high > _DECADE * self.low


def read_settings(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each `key=a,b,c`, in the given order.

    Raises:
        UsageError: an argument has another form, a key is given twice, or brackets or quotes do not match.
    """
    settings: dict[str, list[str]] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        key = key.strip()
        if not separator or not all(key.split(".")):
            raise UsageError(f"'{argument}' is not a setting; write key=value or key=a,b,c")
        if key in settings:
            raise UsageError(f"{key} is given twice; write all its values once: {key}=a,b,c")
        try:
            settings[key] = split_values(text)
        except ValueError as error:
            raise UsageError(f"'{argument}': {error}") from None
    return settings


def split_values(text: str) -> list[str]:
    """Split a text at its commas, except at those inside YAML's brackets and quotes.

    Raises:
        ValueError: brackets or quotes do not match, or a value is empty; a text without commas may be.
    """
    values, begin, open_brackets, quote, before, i = [], 0, "", "", ",", 0
    while i < len(text):
        letter = text[i]
        if quote:
            if letter == "\\" and quote == '"':
                i += 1  # what follows is escaped
            elif letter == quote and quote == "'" and text[i + 1 : i + 2] == "'":
                i += 1  # two of them are one inside
            elif letter == quote:
                quote = ""
        elif letter in "\"'" and before in ",[{:":  # elsewhere it is a plain letter: it's
            quote = letter
        elif letter in _CLOSING:
            open_brackets += _CLOSING[letter]
        elif letter in "]}":
            if not open_brackets.endswith(letter):
                raise ValueError(f"a {letter} closes nothing")
            open_brackets = open_brackets[:-1]
        elif letter == "," and not open_brackets:
            values.append(text[begin:i].strip())
            begin = i + 1
        if not letter.isspace():
            before = letter
        i += 1
    if open_brackets or quote:
        raise ValueError(f"a {(quote or open_brackets)[-1]} is missing at the end")
    values.append(text[begin:].strip())
    if len(values) > 1 and "" in values:
        raise ValueError("a value between two commas, or at an end, is empty")
    return values


def is_range(text: str) -> bool:
    """Return whether a text has the form `low..high`."""
    return _RANGE.fullmatch(text) is not None


def read_range(text: str) -> Range | None:
    """Return the range `low..high`, or None for any other text.

    Raises:
        ValueError: the range is empty.
    """
    if (match := _RANGE.fullmatch(text)) is None:
        return None
    low, high = (float(end.replace("_", "")) for end in match.groups())
    if not low < high:
        raise ValueError(f"{text} is an empty range; write the smaller number first")
    whole = all(re.fullmatch(r"[-+]?[\d_]+", end) for end in match.groups())
    return Range(low, high, whole)


def read_duration(text: str) -> float:
    """Return the seconds of `90s`, `30min` or `2h`.

    Raises:
        ValueError: the text has another form.
    """
    if (match := _DURATION.fullmatch(text.strip())) is None or not float(match[1]):
        raise ValueError("write a time such as 90s, 30min or 2h")
    return float(match[1]) * _SECONDS[match[2].lower()]
