"""Byte-level BPE in GGUF: the kind `gpt2`.

llama.cpp has its own code for each way to split text before the merges, and a name for each. `_PRE_TOKENIZERS` is the
list of those that are equal to what a tokenizer.json describes; a tokenizer that splits otherwise is refused.
"""

from typing import Any

from lightlm.convert.gguf.header import Header
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import ConvertError

KIND = "gpt2"
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

_BOS_BY_DEFAULT = ("llama-bpe",)  # what a missing add_bos_token means


def write_merges(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how a tokenizer splits and merges, as metadata.

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
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def read_merges(header: Header, vocabulary: dict[str, int]) -> tuple[dict[str, Any], bool]:
    """Return the parts of a tokenizer.json, and whether beginning-of-text comes first unless the file says so.

    Raises:
        ConvertError: LightLM does not know how the file's tokenizer splits text.
    """
    pre = header.get("tokenizer.ggml.pre", str)
    names = {name: known for known, synonyms in _SYNONYMS.items() for name in (known, *synonyms)}
    rules = {name: rule for rule, name in _PRE_TOKENIZERS.items()}
    if names.get(pre, pre) not in rules:
        raise ConvertError(f"{header.path} splits text as {pre!r}; LightLM reads {', '.join(sorted({*names, *rules}))}")
    pre = names.get(pre, pre)
    steps, ignore_merges = rules[pre]
    merges = [merge.split(" ", 1) for merge in header.texts("tokenizer.ggml.merges")]
    return _definition(vocabulary, merges, steps, ignore_merges), pre in _BOS_BY_DEFAULT


def _obstacles(tokenizer: Tokenizer) -> list[str]:
    """Return what a tokenizer does that llama.cpp's byte-level BPE does not."""
    content, model = tokenizer.content, tokenizer.content["model"]
    found = []
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


def _definition(
    vocabulary: dict[str, int], merges: list[list[str]], steps: tuple[str, ...], ignore_merges: bool
) -> dict[str, Any]:
    """Return the parts of a tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [_pre_tokenizer(step) for step in steps]
    # Patterns but GPT-2's need a last step that only turns bytes into their characters.
    splits += [] if steps[-1] == _GPT2 else [byte_level | {"use_regex": False}]
    return {
        "normalizer": None,
        "pre_tokenizer": splits[0] if len(splits) == 1 else {"type": "Sequence", "pretokenizers": splits},
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocabulary, "merges": merges},
    }


def _pre_tokenizer(step: str) -> dict[str, Any]:
    """Return the part of a tokenizer.json for one step of splitting."""
    if step == _GPT2:
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if step == _DIGITS:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
