"""Quantities as people write them: `10B` tokens, `512K` tokens per batch, `3_000`, `2%` of a run.

`Tokens`, `BatchTokens` and `Span` are the types of recipe keys written so.
"""

import re
from decimal import Decimal
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

_POWERS = {"": 0, "k": 1, "m": 2, "b": 3, "t": 4}
_QUANTITY = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?(?:e\+?\d{1,3})?)\s*([kmbt]?)\s*", re.IGNORECASE)
_LARGEST = 10**18  # a million T: more is a slip, and would not fit 64 bits
_UNITS = (("", 1), ("K", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12))


def parse_quantity(text: str | int | float, base: int = 1000) -> int:
    """Read a whole number such as `3M`, `1.5B`, `512K`, `1_000` or `1e9`; K, M, B and T are powers of `base`.

    Batch sizes pass base=1024: the field's "512K batch" is 2**19 tokens, a whole number of sequences.

    Raises:
        ValueError: the text is not a quantity, not a whole number (`0.5`), or above 10**18.
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError("write a whole number such as 3000, 512K, 10M or 1.5B")
    # Decimal, not float: in binary, 16.1 x 1000 is not 16,100.
    value = Decimal(match[1].replace("_", "")) * base ** _POWERS[match[2].lower()]
    if value > _LARGEST:
        raise ValueError(f"{text} is too large; the largest number is 1,000,000T")
    if value != value.to_integral_value():
        unit = match[2].upper()
        raise ValueError(f"{text} is not a whole number" + (f": {unit} is {base}" if base == 1024 and unit else ""))
    return int(value)


def format_quantity(number: float) -> str:
    """Return the short form of a number, in three digits: `1.5M` for 1_500_000, `1M` for 999_999."""
    return short_form(number, _UNITS)


def short_form(number: float, units: tuple[tuple[str, float], ...]) -> str:
    """Return a number in three digits and the largest unit that it reaches once it is rounded.

    Args:
        units: (name, size) pairs, the smallest first.
    """
    texts = [(f"{abs(number) / size:.3g}", name) for name, size in units]
    text, name = next((pair for pair in reversed(texts) if float(pair[0]) >= 1), texts[0])
    if "e+" in text:  # beyond the largest unit
        text = f"{float(text):,.0f}"
    return ("-" if number < 0 else "") + text + name


def span_tokens(span: str, total: int) -> int:
    """Return the tokens in a span, which is a share of `total` (`2%`) or a quantity (`375M`).

    Raises:
        ValueError: the span is neither, or the share is not between 0 and 100%.
    """
    try:
        if not span.endswith("%"):
            return parse_quantity(span)
        share = float(span[:-1])
    except ValueError:
        share = -1.0
    if not 0 <= share <= 100:  # also NaN
        raise ValueError("write a share of the run such as 2%, or tokens such as 375M")
    return round(total * share / 100)


def _check_span(span: str) -> str:
    span_tokens(span, 1)
    return span


def _written_as(title: str, pattern: str, minimum: int = 0) -> WithJsonSchema:
    """Return the JSON Schema of a number that a recipe may also write as text, such as `10B` or `2%`."""
    return WithJsonSchema(
        {"title": title, "anyOf": [{"type": "number", "minimum": minimum}, {"type": "string", "pattern": pattern}]}
    )


_PATTERN = r"\d[\d_]*(\.\d+)?([eE]\d+)?[kKmMbBtT]?"
Tokens = Annotated[
    int, BeforeValidator(parse_quantity), Field(ge=0), _written_as("tokens, such as 10B", f"^{_PATTERN}$")
]
BatchTokens = Annotated[
    int,
    BeforeValidator(partial(parse_quantity, base=1024)),
    Field(ge=1),
    _written_as("tokens, such as 512K (2**19)", f"^{_PATTERN}$", 1),
]
Span = Annotated[
    str,
    BeforeValidator(str),
    AfterValidator(_check_span),
    _written_as("share or tokens, such as 2% or 375M", rf"^({_PATTERN}|\d+(\.\d+)?%)$"),
]
