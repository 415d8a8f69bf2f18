"""The beginnings of some documents of a prepared folder, decoded."""

import numpy as np

from lightlm.data.folder import DataFolder

TOKENS = 60
SEARCH_TOKENS = 1 << 20  # a longer document is shown from its middle


def beginnings(folder: DataFolder, count: int) -> list[str]:
    """Return the first `TOKENS` tokens of `count` documents of the train split, spread evenly over it."""
    stream = folder.split("train")
    texts = []
    for number in range(count):
        position = len(stream) * number // count
        tokens = stream.slice(position, min(SEARCH_TOKENS, len(stream) - position))
        ends = np.flatnonzero(tokens[:-1] == stream.end_of_text_id) if number else np.zeros(0, np.int64)
        start = int(ends[0]) + 1 if ends.size else 0
        beginning = tokens[start : start + TOKENS]
        stop = np.flatnonzero(beginning == stream.end_of_text_id)
        texts.append(folder.tokenizer.decode(beginning[: stop[0]] if stop.size else beginning))
    return texts
