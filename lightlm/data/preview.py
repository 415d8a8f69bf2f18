"""A look into a prepared folder: the beginnings of some of its documents, decoded."""

import numpy as np

from lightlm.data.shards import DataFolder

TOKENS = 60
SEARCH_TOKENS = 1 << 20  # a document that is longer than this is shown from its middle


def beginnings(folder: DataFolder, count: int) -> list[str]:
    """The first `TOKENS` tokens of `count` documents of the train split, spread evenly over it."""
    stream = folder.split("train")
    texts = []
    for number in range(count):
        place = len(stream) * number // count
        block = stream.slice(place, min(SEARCH_TOKENS, len(stream) - place))
        ends = np.flatnonzero(block[:-1] == stream.end_of_text_id) if number else np.zeros(0, np.int64)
        start = int(ends[0]) + 1 if ends.size else 0
        piece = block[start : start + TOKENS]
        stop = np.flatnonzero(piece == stream.end_of_text_id)
        texts.append(folder.tokenizer.decode(piece[: stop[0]] if stop.size else piece))
    return texts
