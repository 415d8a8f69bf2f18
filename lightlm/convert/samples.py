"""Texts with which `lightlm convert --verify` compares a conversion and its source. Imports nothing heavy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lightlm.checkpoint import LoadedModel

# Spaces, cases, digits, scripts, accents in both normal forms, code, special tokens.
TEXTS = (
    "Hello, I am a language model: naïve café, 3.14,\n\tdon't stop.  The end",
    "DON'T we'll I'd they've it's you're I'M  'tis   rock'n'roll",
    " leading and trailing   \n\n\n  \t \r\n windows\r\n\r\nend  ",
    "0 12 345 6789 12345678901 1,234.5 ½ Ⅷ ٣٤ 2²³ 1e-05 0x1F",
    "def f(x):\n    if x > 0:\n        return x**2  # square\n\n\tfor i in range(10): pass",
    '{"key": [1, 2.5, null], "a\\nb": "\\u00e9"} <tag attr=\'x\'/> $x_{i}^2$ #include <a.h>',
    "日本語のテキスト、中文文本。한국어 텍스트! ไทย हिन्दी العربية עברית ελληνικά русский",
    "cafe\u0301 e\u0301\u0302 \u1e69 \ufb01 Å \u212b \u200b\u200d\ufeff\u00a0\u2003x\u3000y",
    "😀👍🏽👨‍👩‍👧 🇩🇪 ™ © → ∑ ≠ — … “quoted” ‘single’ «guillemets»",
    "<|endoftext|> <s> </s> <|im_start|>user\n[INST] [PAD3] <0x0A> ▁ Ġ",
    "supercalifragilisticexpialidocious AAAAaaaa----====____....!!!!????",
    "\x00\x01\x7f \x1b[0m \u2028\u2029 \U0010ffff",
)
_ROWS, _LENGTH = 4, 128  # a row has at most so many tokens


def sample_tokens(loaded: "LoadedModel") -> "Tensor":
    """Return tokens of `TEXTS` (R, T), each row beginning with another text, as long as the model reads them."""
    import torch

    length = min(_LENGTH, loaded.model.config.max_seq_len)
    rows = []
    for first in range(_ROWS):
        ids = list(loaded.tokenizer.context_ids)
        for text in TEXTS[first:] + TEXTS[:first]:
            ids += loaded.tokenizer.encode(text)
        rows.append((ids * (length // len(ids) + 1))[:length])
    return torch.tensor(rows)
