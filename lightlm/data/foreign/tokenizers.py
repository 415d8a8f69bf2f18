"""Tokenizers in the files of other training programs.

nanoGPT writes the characters of a character-level model to meta.pkl. llm.c writes the bytes of GPT-2's tokens to
gpt2_tokenizer.bin. A tokenizer.json, or vocab.json and merges.txt, beside them takes precedence.
"""

import io
import itertools
import json
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.definition import byte_alphabet
from lightlm.data.tokenizer.folder import DEFINITION, MERGES, VOCABULARY
from lightlm.errors import DataError

CHARACTERS, TOKEN_BYTES = "meta.pkl", "gpt2_tokenizer.bin"
END_OF_TEXT = "<|endoftext|>"
_LARGEST_FILE = 64 << 20  # bytes; the two files take less than one megabyte
_HEADER = struct.Struct("<256i")
_MAGIC, _VERSIONS = 20240328, (1, 2)


def tokenizer_in(folders: Iterable[Path]) -> Tokenizer | None:
    """Return the tokenizer in the first of the folders that has one; None if none has.

    Raises:
        DataError: a file is damaged, or is not what its name says.
    """
    for folder in folders:
        if (folder / DEFINITION).is_file() or all((folder / name).is_file() for name in (VOCABULARY, MERGES)):
            return Tokenizer.read(folder)
        for name, read in _READERS.items():
            if (folder / name).is_file():
                return read(folder / name)
    return None


def read_characters(path: Path) -> Tokenizer:
    """Return the tokenizer of nanoGPT's meta.pkl: one token per character.

    The file is a pickle of dictionaries, texts and numbers. A pickle that names anything else is refused before it is
    called. Such a model has no end-of-text token. The tokenizer gets one with the first id after the characters, which
    the model never draws, and texts begin with a line end, as in nanoGPT's sample.py.

    Raises:
        DataError: the file is not such a pickle.
    """
    values = _plain_pickle(path)
    ids = values.get("stoi") if isinstance(values, dict) else None
    if (
        not isinstance(ids, dict)
        or not ids
        or not all(isinstance(character, str) and len(character) == 1 for character in ids)
        or sorted(map(repr, ids.values())) != sorted(map(repr, range(len(ids))))
    ):
        raise DataError(
            f"{path} does not say which id each character has: `stoi` must map single characters to 0, 1, 2, ...; "
            f"write a {DEFINITION} into the folder instead"
        )
    definition = _definition(ids, [], END_OF_TEXT, len(ids)) | {"decoder": {"type": "Fuse"}}
    tokenizer = Tokenizer(json.dumps(definition).encode(), origin=str(path))
    start = "\n" if "\n" in ids else min(ids, key=ids.__getitem__)
    return tokenizer.used_as(ids[start], False, {"bos_token": start}, {})


def read_token_bytes(path: Path) -> Tokenizer:
    """Return GPT-2's tokenizer from llm.c's gpt2_tokenizer.bin, which holds the bytes of each token.

    The ids of byte-level BPE are in the order of its merges, so the bytes decide the merges: a token joins the two
    parts that the merges before it leave of its bytes.

    Raises:
        DataError: the file is damaged, or does not hold such a vocabulary.
    """
    content = _content(path)
    magic, version, count, end = _HEADER.unpack_from(content.ljust(_HEADER.size, b"\0"))[:4]
    if magic != _MAGIC or version not in _VERSIONS or not 257 <= count <= len(content):
        raise DataError(f"{path} is not a tokenizer of llm.c: magic {magic}, version {version}, {count} tokens")
    if version == 1:  # without the id of end-of-text, which is the last
        end = count - 1
    tokens: list[bytes] = []
    place = _HEADER.size
    for _ in range(count):
        length = content[place] if place < len(content) else 0
        tokens.append(content[place + 1 : place + 1 + length])
        place += 1 + length
    if place != len(content):
        raise DataError(f"{path} is damaged: its {count} tokens take {place} bytes, the file has {len(content)}")
    words = {token: index for index, token in enumerate(tokens) if index != end}
    if end != count - 1 or len(words) != count - 1 or not all(bytes([byte]) in words for byte in range(256)):
        raise DataError(f"{path} is not a vocabulary of byte-level BPE with end-of-text as its last token")
    characters = {byte: character for character, byte in byte_alphabet().items()}
    spelled = {"".join(characters[byte] for byte in token): index for token, index in words.items()}
    merges = [
        tuple("".join(characters[byte] for byte in part) for part in _parts(token, words))
        for token in words
        if len(token) > 1
    ]
    if any(len(pair) != 2 for pair in merges):
        raise DataError(f"{path} is not a vocabulary of byte-level BPE: a token is not two earlier ones")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    definition = _definition(spelled, merges, END_OF_TEXT, end)
    definition |= {"pre_tokenizer": byte_level, "decoder": byte_level}
    return Tokenizer(json.dumps(definition).encode(), origin=str(path))


_READERS = {CHARACTERS: read_characters, TOKEN_BYTES: read_token_bytes}


class _PlainUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, texts and numbers; whatever a pickle names beyond them is refused, not called."""

    def find_class(self, module: str, name: str) -> Any:
        raise _CalledError(f"{module}.{name}")


class _CalledError(Exception):
    """A pickle names a function or a class."""


def _plain_pickle(path: Path) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(_content(path))).load()
    except _CalledError as error:
        raise DataError(
            f"{path} is refused: reading it would call {error}, which could be any code; write a {DEFINITION} into the "
            "folder instead"
        ) from None
    except DataError:
        raise
    # Damaged pickles raise errors of almost any kind.
    except Exception as error:
        raise DataError(f"{path} is not a pickle that can be read: {type(error).__name__}") from None


def _content(path: Path) -> bytes:
    if (size := path.stat().st_size) > _LARGEST_FILE:
        raise DataError(f"{path} has {size:,} bytes; a tokenizer of this kind has far fewer, so it is not read")
    return path.read_bytes()


def _definition(vocabulary: dict[str, int], merges: list[Any], end_of_text: str, end_of_text_id: int) -> dict[str, Any]:
    """Return a tokenizer.json of a BPE with an end-of-text token."""
    special = {"id": end_of_text_id, "content": end_of_text, "special": True, "normalized": False}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "version": "1.0",
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "model": {"type": "BPE", "vocab": vocabulary | {end_of_text: end_of_text_id}, "merges": merges},
    }


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return what the merges of lower rank than a token's leave of its bytes."""
    limit, parts = ranks[token], [bytes([byte]) for byte in token]
    while True:
        joined = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        if not joined or (lowest := min(joined)) >= limit:
            return parts
        place = joined.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
