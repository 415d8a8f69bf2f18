"""Types of recipe keys that people write as quantities: `10B`, `512K`, `2%`."""

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from lightlm.quantities import parse_quantity


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


_QUANTITY = r"\d[\d_]*(\.\d+)?([eE]\d+)?[kKmMbBtT]?"
Tokens = Annotated[
    int, BeforeValidator(parse_quantity), Field(ge=0), _written_as("tokens, such as 10B", f"^{_QUANTITY}$")
]
BatchTokens = Annotated[
    int,
    BeforeValidator(partial(parse_quantity, base=1024)),
    Field(ge=1),
    _written_as("tokens, such as 512K (2**19)", f"^{_QUANTITY}$", 1),
]
Span = Annotated[
    str,
    BeforeValidator(str),
    AfterValidator(_check_span),
    _written_as("share or tokens, such as 2% or 375M", rf"^({_QUANTITY}|\d+(\.\d+)?%)$"),
]
