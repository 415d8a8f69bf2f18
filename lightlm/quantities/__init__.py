"""Quantities as people write them: `10B` tokens, `512K` tokens per batch, `3_000`."""

import re
from decimal import Decimal

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
