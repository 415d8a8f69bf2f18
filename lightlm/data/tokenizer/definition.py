"""What a tokenizer.json says about how text becomes tokens. Functions of its content; none needs `tokenizers`."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Content = Mapping[str, Any]

# The entries that stand for single bytes where a tokenizer falls back on them.
BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}

_SPACE_BORDER = re.compile(r"(?<=\S)(?= \S)")
_BORDER = re.compile(rf"(?<=\S\n)(?=\S)|{_SPACE_BORDER.pattern}|(?<=[^\W\d_])(?=[。，、！？])")


def is_byte_level(content: Content) -> bool:
    """Return whether tokens consist of bytes, each one a character of an alphabet, as in GPT-2."""
    parts = _components([content.get("pre_tokenizer"), content.get("decoder")])
    return any(part.get("type") == "ByteLevel" for part in parts)


def is_word_based(content: Content) -> bool:
    """Return whether whole words are looked up, so that single characters say nothing about them."""
    return (content.get("model") or {}).get("type") in ("WordPiece", "WordLevel")


def unknown_token(content: Content) -> int | str | None:
    """Return the token for what the tokenizer does not know, by its id or its name, or None."""
    model = content.get("model") or {}
    index = model.get("unk_id")
    return index if isinstance(index, int) else model.get("unk_token")


def merges_of(content: Content) -> list[list[str]]:
    """Return the merges of a BPE in order, which a definition holds as pairs or as texts with a space."""
    found = (content.get("model") or {}).get("merges") or []
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in found]


def border_pattern(content: Content) -> re.Pattern[str] | None:
    """Return a zero-width pattern for places where a text may be cut without changing its ids; None without any.

    Byte-level pre-tokenizers never join a line end between two visible characters to the next character, nor a
    single space, or an ideographic comma, to the letter before it. Those that put a space in front of a text can
    only be cut before a space. Others (Metaspace) may put one without declaring it.
    """
    if not is_byte_level(content):
        return None
    parts = _components(content.get("pre_tokenizer"))
    return _SPACE_BORDER if any(part.get("add_prefix_space") is True for part in parts) else _BORDER


def bytes_reader(content: Content) -> Callable[[str], bytes]:
    """Return a function from the name of an entry to the UTF-8 bytes of text for which it stands.

    They may be a part of a character.
    """
    if is_byte_level(content):
        return _bytes_of_alphabet
    prefix = (content.get("model") or {}).get("continuing_subword_prefix") or ""  # ## of a WordPiece

    def read(name: str) -> bytes:
        if name in BYTE_TOKENS:
            return bytes([BYTE_TOKENS[name]])
        return name.removeprefix(prefix).replace("▁", " ").encode()

    return read


def _bytes_of_alphabet(name: str) -> bytes:
    if all(character in _ALPHABET for character in name):
        return bytes(_ALPHABET[character] for character in name)
    return name.encode()  # as the decoder of `tokenizers` does


def _components(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a component of a tokenizer.json and every component inside it."""
    if isinstance(part, dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _components(inner)


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level tokenizers write for one (GPT-2's alphabet)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()
