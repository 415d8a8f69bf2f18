"""Quantities as people write them: `10B` tokens, `512K` tokens per batch, `3_000`."""

import math
import re

_POWERS = {"": 0, "k": 1, "m": 2, "b": 3, "t": 4}
_QUANTITY = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)\s*", re.IGNORECASE)


def parse_quantity(text: str | int | float, base: int = 1000) -> int:
    """Read a whole number such as `3M`, `1.5B`, `512K`, `1_000` or `1e9`; K, M, B and T are powers of `base`.

    Batch sizes pass base=1024: the field's "512K batch" is 2**19 tokens, a whole number of sequences.

    Raises:
        ValueError: the text is not a quantity, or not a whole number (`0.5`).
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError("write a whole number such as 3000, 512K, 10M or 1.5B")
    digits, factor = match[1].replace("_", ""), base ** _POWERS[match[2].lower()]
    value = float(digits) * factor
    if not math.isfinite(value) or value != round(value):
        raise ValueError(f"{text} is not a whole number")
    # Above 2**53 a float cannot hold every integer, so plain digits go through int.
    return int(digits) * factor if digits.isdigit() else round(value)


def format_quantity(number: float) -> str:
    """Return the short form of a number: `1.5M` for 1_500_000."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
