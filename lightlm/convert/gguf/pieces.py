"""SentencePiece's BPE in GGUF: the kind `llama`, as of Llama 1 and 2, Mistral and MobileLLM.

A tokenizer.json has merges, pairs of tokens in order; llama.cpp has a score for each token, and joins any two neighbors
that make a token, the highest score first. Both do the same if every pair that makes a token is a merge, and the merges
that make one token follow each other. That is so where the merges come from SentencePiece.
"""

from collections.abc import Iterator
from typing import Any

from lightlm.convert.gguf.header import Header
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.definition import BYTE_TOKENS
from lightlm.errors import ConvertError

KIND = "llama"
BLANK = "▁"
_UNKNOWN = "tokenizer.ggml.unknown_token_id"
_LONGEST = 256  # characters of a token; SentencePiece makes 16 unless told otherwise
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PREPEND = {"type": "Prepend", "prepend": BLANK}
# How text is prepared: normalizer, pre-tokenizer, and whether a blank comes before the text. A Metaspace that prepends
# one is missing: it does not where a text begins with a blank, and llama.cpp does.
_FORMS: tuple[tuple[Any, Any, bool], ...] = (
    ({"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}, None, True),
    ({"type": "Sequence", "normalizers": [_REPLACE]}, None, False),
    (_REPLACE, None, False),
    (None, {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "never", "split": False}, False),
)


def write_merges(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how a tokenizer prepares and joins text, as metadata.

    Raises:
        ConvertError: llama.cpp does not have such a tokenizer.
    """
    content, model = tokenizer.content, tokenizer.content["model"]
    vocabulary = model["vocab"]
    form = (content.get("normalizer"), content.get("pre_tokenizer"))
    prefixes = [prefix for *known, prefix in _FORMS if tuple(known) == form]
    obstacles = [] if prefixes else ["it prepares text otherwise than SentencePiece"]
    if not model.get("byte_fallback") or not vocabulary.keys() >= BYTE_TOKENS.keys():
        obstacles.append("it does not have a token for each byte")
    if any(not added["special"] for added in content.get("added_tokens") or []):
        obstacles.append("it has added tokens that are not special")
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    made = ["".join(merge) for merge in merges]
    order = {token: rank for rank, token in enumerate(dict.fromkeys(made))}
    ranks = [order[token] for token in made]
    names = {added["content"] for added in content.get("added_tokens") or []}
    plain = {token: index for token, index in vocabulary.items() if token not in names | BYTE_TOKENS.keys()}
    if ranks != sorted(ranks) or set(merges) != set(_pairs(plain, list(plain))):
        obstacles.append("its merges are not those of SentencePiece")
    if obstacles:
        raise ConvertError(f"llama.cpp does not have such a tokenizer: {'; '.join(obstacles)}")
    last = float(len(order))
    scores = [-last] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        scores[index] = -float(order.get(token, last))
    return {
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefixes[0],
    }


def _pairs(vocabulary: dict[str, int], tokens: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each pair of tokens that makes one of `tokens`."""
    for token in tokens:
        for middle in range(1, len(token)):
            if token[:middle] in vocabulary and token[middle:] in vocabulary:
                yield token[:middle], token[middle:]


def read_merges(header: Header, vocabulary: dict[str, int]) -> tuple[dict[str, Any], bool]:
    """Return the parts of a tokenizer.json, and that beginning-of-text comes first unless the file says so."""
    scores = header.numbers("tokenizer.ggml.scores")
    if len(scores) <= max(vocabulary.values(), default=-1):
        raise ConvertError(f"{header.path} has {len(scores):,} scores for {len(vocabulary):,} tokens")
    prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    plain = {token: index for token, index in vocabulary.items() if token not in BYTE_TOKENS}
    if max(map(len, plain), default=0) > _LONGEST:
        raise ConvertError(f"{header.path} has a token of more than {_LONGEST} characters")
    ordered = sorted(plain, key=lambda token: -scores[plain[token]])
    unknown = next((token for token, index in vocabulary.items() if index == header.metadata.get(_UNKNOWN)), None)
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocabulary,
        "merges": list(dict.fromkeys(_pairs(plain, ordered))),
    }
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    normalizers = [_PREPEND, _REPLACE] if prefix else [_REPLACE]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model,
    }, True
