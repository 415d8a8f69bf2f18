"""Tokenizers in GGUF: the metadata from which llama.cpp makes the same tokens of a text as `tokenizers` does."""

import json
from enum import IntEnum
from typing import Any

from lightlm.convert.gguf import byte_level, pieces
from lightlm.convert.gguf.header import Header
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.definition import BYTE_TOKENS
from lightlm.data.tokenizer.folder import OTHER_TEMPLATES
from lightlm.errors import ConvertError, DataError
from lightlm.names import warn


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special: never read from text, left out of text
    USER_DEFINED = 4  # found in text before anything else
    UNUSED = 5
    BYTE = 6


_NOT_IN_MODEL = (TokenType.UNUSED, TokenType.USER_DEFINED)  # tokens that merges neither make nor use
_ADDED = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)


_ROLE_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_MORE_ENDS = ("eot", "eom")  # end of turn, end of message


def write_vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata of a model with `size` rows in its token table.

    Raises:
        ConvertError: llama.cpp does not have such a tokenizer.
    """
    kind = tokenizer.content["model"].get("type")
    if kind != "BPE":
        raise ConvertError(f"llama.cpp does not have such a tokenizer: its model is {kind}, must be BPE")
    how = byte_level if tokenizer.byte_level else pieces
    names, types = _entries(tokenizer, size)
    values = {
        "tokenizer.ggml.model": how.KIND,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": False,
    }
    values |= how.write_merges(tokenizer) | _roles(tokenizer)
    if scores := values.get("tokenizer.ggml.scores"):  # llama.cpp wants one for each row
        scores += [min(scores)] * (size - len(scores))
    return values


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids of tokens that have a meaning, and the chat template."""
    end, settings = tokenizer.end_of_text_id, tokenizer.settings
    ids = {"bos": tokenizer.start_id, "eos": end, "padding": tokenizer.id_of(settings.get("pad_token"))}
    unknown = tokenizer.id_of(settings.get("unk_token"))
    ids |= {"unknown": tokenizer.unknown_id if unknown is None else unknown}
    more = sorted(tokenizer.end_ids - {end})
    ids |= dict(zip(_MORE_ENDS, more, strict=False))
    if further := [tokenizer.name_of(index) for index in more[len(_MORE_ENDS) :]]:
        warn(
            f"GGUF names three tokens that end an answer; llama.cpp knows {further} only if their names are usual ones"
        )
    roles = {f"tokenizer.ggml.{role}_token_id": index for role, index in ids.items() if index is not None}
    template = settings.get("chat_template")
    if others := settings.get(OTHER_TEMPLATES):
        warn(f"GGUF gets the default chat template only, not {', '.join(sorted(others))}")
    return roles | ({"tokenizer.chat_template": template} if template else {})


def _entries(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Return the characters and the type of each row of the token table; rows without a token are unused."""
    names = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for name, index in tokenizer.content["model"]["vocab"].items():
        byte = name in BYTE_TOKENS and not tokenizer.byte_level
        names[index], types[index] = name, int(TokenType.BYTE if byte else TokenType.NORMAL)
    for added in tokenizer.content.get("added_tokens") or []:
        index = added["id"]
        special = index in tokenizer.special_tokens
        names[index], types[index] = added["content"], int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    if tokenizer.unknown_id is not None:
        types[tokenizer.unknown_id] = int(TokenType.UNKNOWN)
    return names, types


def read_vocabulary(header: Header, size: int) -> Tokenizer:
    """Return the tokenizer of a file whose token table has `size` rows.

    Raises:
        ConvertError: LightLM does not have such a tokenizer, or its parts do not fit together.
    """
    model = header.get("tokenizer.ggml.model", str)
    models = {how.KIND: how for how in (byte_level, pieces)}
    if model not in models:
        raise ConvertError(f"{header.path} has a tokenizer of the kind {model!r}; LightLM reads {' and '.join(models)}")
    tokens = header.texts("tokenizer.ggml.tokens")
    types = header.numbers("tokenizer.ggml.token_type")
    if not len(tokens) == len(types) == size:
        raise ConvertError(
            f"{header.path} has {len(tokens):,} tokens and {len(types):,} types of tokens, its table {size:,} rows"
        )
    ids = {role: _token_id(header, role, size) for role in ("bos", "eos", *_MORE_ENDS, "unknown", "padding")}
    end = ids["eos"] if ids["eos"] is not None else ids["bos"]
    if end is None:
        raise ConvertError(f"{header.path} names no token that ends a text: tokenizer.ggml.eos_token_id is missing")
    rows = list(enumerate(zip(tokens, types, strict=True)))
    vocabulary = {token: index for index, (token, kind) in rows if kind not in _NOT_IN_MODEL}
    parts, bos_by_default = models[model].read_merges(header, vocabulary)
    bos = ids["bos"]
    adds_bos = header.get("tokenizer.ggml.add_bos_token", bool, bos_by_default) and bos is not None
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, token, kind) for index, (token, kind) in rows if kind in _ADDED],
        "post_processor": _begins_with(tokens[bos], bos) if adds_bos and bos is not None else None,
        **parts,
    }
    text = json.dumps(definition, ensure_ascii=False, indent=2)
    try:
        tokenizer = Tokenizer(text.encode(), origin=f"the tokenizer in {header.path}", end_of_text_id=end)
    except DataError as error:
        raise ConvertError(str(error)) from None
    named = {name: ids[role] for role, name in _ROLE_NAMES.items()}
    settings: dict[str, Any] = {name: tokens[index] for name, index in named.items() if index is not None}
    if "tokenizer.chat_template" in header.metadata:
        settings["chat_template"] = header.get("tokenizer.chat_template", str)
    more = [index for role in _MORE_ENDS if (index := ids[role]) is not None]
    generation = {"eos_token_id": [end, *more]} if more else {}
    return tokenizer.used_as(bos if adds_bos or bos != end else None, adds_bos, settings, generation)


def _token_id(header: Header, role: str, size: int) -> int | None:
    """Return the id of the token with a role, or None if the file names none."""
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in header.metadata:
        return None
    index = header.get(key, int)
    if not 0 <= index < size:
        raise ConvertError(f"{header.path}: {key} is {index}, the token table has {size:,} rows")
    return int(index)


def _added(index: int, token: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, "special": kind != TokenType.USER_DEFINED, **flags}


def _begins_with(token: str, index: int) -> dict[str, Any]:
    """Return a post-processor that puts a token before each text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    special = {token: {"id": token, "ids": [index], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": special,
    }
