"""Tokenizers in GGUF: the metadata from which llama.cpp splits text into the same tokens as `tokenizers` does.

llama.cpp has its own code for each way to split text before the merges, and a name for each. `_PRE_TOKENIZERS` is the
list of those that are equal to what a tokenizer.json describes; a tokenizer that splits otherwise is refused.
"""

import json
from enum import IntEnum
from typing import Any

from lightlm.convert.gguf.header import Header
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import ConvertError, DataError


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special: never read from text, left out of text
    USER_DEFINED = 4  # found in text before anything else
    UNUSED = 5
    BYTE = 6


# The patterns by which tokenizer.json files split text.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = "GPT-2"  # the pattern inside `ByteLevel`
_DIGITS = "digits"  # each digit by itself

# (How text is split, whether a word that is a token is taken without merges) -> llama.cpp's name.
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
}

# Further names that llama.cpp has for the same code.
_SYNONYMS = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe", "gigachat", "exaone4"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "megrez"),
}
_ROLE_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_MORE_ENDS = ("eot", "eom")  # end of turn, end of message
_BOS_BY_DEFAULT = ("llama-bpe",)  # what a missing add_bos_token means


def write_vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata of a model with `size` rows in its token table.

    Raises:
        ConvertError: llama.cpp does not have such a tokenizer.
    """
    model = tokenizer.content["model"]
    obstacles = _obstacles(tokenizer)
    steps = _splits(tokenizer.content.get("pre_tokenizer")) or ()
    pre = _PRE_TOKENIZERS.get((steps, model.get("ignore_merges") is True))
    if pre is None:
        obstacles.append("a way of splitting text that it does not have (see docs/guides/conversion.md)")
    if obstacles:
        raise ConvertError(f"llama.cpp does not have such a tokenizer: {'; '.join(obstacles)}")
    names, types = _entries(tokenizer, size)
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": False,
    }
    return values | _roles(tokenizer)


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids of tokens that have a meaning, and the chat template."""
    end, settings = tokenizer.end_of_text_id, tokenizer.settings
    ids = {"bos": tokenizer.start_id, "eos": end, "padding": tokenizer.id_of(settings.get("pad_token"))}
    ids |= {"unknown": tokenizer.id_of(settings.get("unk_token"))}
    # llama.cpp knows two more tokens that end an answer; further ones it finds by their usual names.
    ids |= dict(zip(_MORE_ENDS, sorted(tokenizer.end_ids - {end}), strict=False))
    roles = {f"tokenizer.ggml.{role}_token_id": index for role, index in ids.items() if index is not None}
    template = settings.get("chat_template")
    return roles | ({"tokenizer.chat_template": template} if template else {})


def _entries(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Return the characters and the type of each row of the token table; rows without a token are unused."""
    names = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for name, index in tokenizer.content["model"]["vocab"].items():
        names[index], types[index] = name, int(TokenType.NORMAL)
    for added in tokenizer.content.get("added_tokens") or []:
        index = added["id"]
        special = index in tokenizer.special_tokens
        names[index], types[index] = added["content"], int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    return names, types


def _obstacles(tokenizer: Tokenizer) -> list[str]:
    """Return what a tokenizer does that llama.cpp's byte-level BPE does not."""
    content, model = tokenizer.content, tokenizer.content["model"]
    found = []
    if model.get("type") != "BPE" or not tokenizer.byte_level:
        return ["it is not a byte-level BPE"]
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        found.append(f"its normalizer {content['normalizer'].get('type')}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback", "unk_token"):
        if model.get(key):
            found.append(f"{key}: {model[key]!r}")
    for added in content.get("added_tokens") or []:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if added.get(flag)]
        if flags and added["id"] not in tokenizer.special_tokens:
            found.append(f"the added token {added['content']!r} with {', '.join(flags)}")
    return found


def _splits(part: Any) -> tuple[str, ...] | None:
    """Return how a pre-tokenizer splits text, one name or pattern per step; None for one that no name stands for."""
    if not isinstance(part, dict):
        return None
    match part.get("type"):
        case "Sequence":
            steps = [_splits(inner) for inner in part.get("pretokenizers", [])]
            return None if None in steps else tuple(name for step in steps for name in step or ())
        case "Digits" if part.get("individual_digits") is True:
            return (_DIGITS,)
        case "ByteLevel" if part.get("add_prefix_space") is False:
            return (_GPT2,) if part.get("use_regex", True) else ()
        case "Split" if part.get("behavior") == "Isolated" and not part.get("invert"):
            pattern = part.get("pattern")
            return (pattern["Regex"],) if isinstance(pattern, dict) and "Regex" in pattern else None
    return None


def read_vocabulary(header: Header, size: int) -> Tokenizer:
    """Return the tokenizer of a file whose token table has `size` rows.

    Raises:
        ConvertError: LightLM does not have such a tokenizer, or its parts do not fit together.
    """
    kind = header.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise ConvertError(f"{header.path} has a tokenizer of the kind {kind!r}; LightLM reads gpt2, a byte-level BPE")
    pre = header.get("tokenizer.ggml.pre", str)
    names = {name: known for known, synonyms in _SYNONYMS.items() for name in (known, *synonyms)}
    rules = {name: rule for rule, name in _PRE_TOKENIZERS.items()}
    pre = names.get(pre, pre)
    if pre not in rules:
        raise ConvertError(f"{header.path} splits text as {pre!r}; LightLM reads {', '.join(sorted({*names, *rules}))}")
    tokens = header.get("tokenizer.ggml.tokens", list)
    types = header.get("tokenizer.ggml.token_type", list)
    if not len(tokens) == len(types) == size:
        raise ConvertError(
            f"{header.path} has {len(tokens):,} tokens and {len(types):,} types of tokens, its table {size:,} rows"
        )
    ids = {role: _token_id(header, role, size) for role in ("bos", "eos", *_MORE_ENDS, "unknown", "padding")}
    end = ids["eos"] if ids["eos"] is not None else ids["bos"]
    if end is None:
        raise ConvertError(f"{header.path} names no token that ends a text: tokenizer.ggml.eos_token_id is missing")
    adds_bos = header.get("tokenizer.ggml.add_bos_token", bool, pre in _BOS_BY_DEFAULT) and ids["bos"] is not None
    steps, ignore_merges = rules[pre]
    merges = header.get("tokenizer.ggml.merges", list)
    definition = _definition(tokens, types, merges, steps, ignore_merges)
    if adds_bos:
        bos = tokens[ids["bos"]]
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [ids["bos"]], "tokens": [bos]}},
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
    bos_id = ids["bos"] if adds_bos or ids["bos"] != end else None
    return tokenizer.used_as(bos_id, adds_bos, settings, generation)


def _token_id(header: Header, role: str, size: int) -> int | None:
    """Return the id of the token with a role, or None if the file names none."""
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in header.metadata:
        return None
    index = header.get(key, int)
    if not 0 <= index < size:
        raise ConvertError(f"{header.path}: {key} is {index}, the token table has {size:,} rows")
    return int(index)


def _definition(
    tokens: list[str], types: list[int], merges: list[str], steps: tuple[str, ...], ignore_merges: bool
) -> dict[str, Any]:
    """Return a tokenizer.json."""
    kinds = {int(kind): name for kind, name in ((TokenType.CONTROL, "special"), (TokenType.USER_DEFINED, "word"))}
    added = [
        {
            "id": index,
            "content": token,
            "special": kinds[kind] == "special",
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in kinds
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [_pre_tokenizer(step) for step in steps]
    # Patterns but GPT-2's need a last step that only turns bytes into their characters.
    splits += [] if steps[-1] == _GPT2 else [byte_level | {"use_regex": False}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": splits[0] if len(splits) == 1 else {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {
                token: index
                for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
                if kind not in (TokenType.UNUSED, TokenType.USER_DEFINED)
            },
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def _pre_tokenizer(step: str) -> dict[str, Any]:
    """Return the part of a tokenizer.json for one step of splitting."""
    if step == _GPT2:
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if step == _DIGITS:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
