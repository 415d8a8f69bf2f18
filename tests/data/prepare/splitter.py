"""The rule that splits documents, applied to the whole corpus in memory."""

import math
from collections.abc import Iterable

import xxhash

from lightlm.data.folder import DataFolder
from lightlm.data.shards import SPLITS, Split
from lightlm.data.tokenizer import Tokenizer


def expected_split(documents: Iterable[str], val_fraction: float, tokenizer: Tokenizer) -> dict[Split, list[int]]:
    """Return the tokens of both splits."""
    end = tokenizer.end_of_text_id
    tokens: dict[Split, list[int]] = {"train": [], "val": []}
    for text in documents:
        chosen = xxhash.xxh3_64_intdigest(text.encode()) % 2**32 < val_fraction * 2**32
        tokens["val" if chosen else "train"] += [*tokenizer.encode(text), end]
    total = len(tokens["train"])
    if val_fraction and total > 1 and not tokens["val"]:
        count = min(max(math.ceil(val_fraction * total), min(1024, math.ceil(total / 10))), total - 1)
        cut = total - count
        begins = next(place for place in range(cut, total + 1) if tokens["train"][place - 1] == end)
        cut = begins if begins - cut <= count // 2 else cut
        tokens = {"train": tokens["train"][:cut], "val": tokens["train"][cut:]}
        if tokens["train"][-1] != end:
            tokens["train"].append(end)
    return tokens


def tokens_of(folder: DataFolder) -> dict[Split, list[int]]:
    """Return the tokens of both splits of a data folder."""
    return {split: folder.split(split).slice(0, len(folder.split(split))).tolist() for split in SPLITS}
