"""Texts that are hard to split: all of Unicode, digits, blanks and code, drawn from a seed."""

import random
import unicodedata

from lightlm.convert.gguf.verify import TEXTS

_POOLS = [
    "abcdefghijklmnopqrstuvwxyz ",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabc' ",
    "0123456789.,-+eE ",
    " \t\n\r\u00a0\u2003\u3000\x0b\x0c\x85\u200b\u2028",
    "éàüñçßøåÆœ",
    "你好世界。，日本語テキスト한국어",
    "العربيةעבריתहिन्दीไทย",
    "αβγΔЖдя",
    "😀👍🏽👩‍💻🇩🇪❤️",
    "{}[]()<>=+-*/%&|!?;:'\"\\#@$^~`_",
    "½Ⅷ٣²³①",
    "\u0301\u0302\u0308e\u200d\ufe0f",
    [
        "def ",
        "return ",
        "\n    if x == 1:\n",
        "\t\tfor i in range(10):\n",
        "->",
        "self.",
        "'ll",
        "'S",
        "'Re",
        "don't",
        "I'D",
    ],
    [chr(code) for code in range(32, 0x1FAFF) if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")],
]


def hard_texts(count: int, seed: int = 0) -> list[str]:
    """Return `count` texts: the first are those of `--verify`."""
    draw = random.Random(seed)

    def text() -> str:
        pools = draw.choices(_POOLS, k=draw.randint(1, 12))
        return "".join("".join(draw.choices(pool, k=draw.randint(1, 8))) for pool in pools)

    return [*TEXTS, *(text() for _ in range(count - len(TEXTS)))]
