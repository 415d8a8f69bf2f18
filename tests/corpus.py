"""A small generated English-like corpus, and a data folder made of it: tests need no third-party text."""

import json
import random
from pathlib import Path

import numpy as np

from lightlm.data.prepare.run import prepare
from lightlm.data.readers.texts import Unit, raise_bad
from lightlm.data.shards import shard_header

_SUBJECTS = ["the old clock", "a small dog", "my sister", "the river", "every student", "the green door", "a tall ship"]
_VERBS = ["watches", "follows", "remembers", "carries", "opens", "forgets", "draws"]
_OBJECTS = ["the morning", "a letter", "the quiet road", "seven stones", "its own shadow", "the last page", "a song"]
_ENDS = ["near the sea", "without a word", "again and again", "before it rains", "as it did last year", "in the dark"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 3 to 12 sentences."""
    rng = random.Random(seed)

    def sentence() -> str:
        words = [rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS), rng.choice(_ENDS)]
        return " ".join(words).capitalize() + "."

    return [" ".join(sentence() for _ in range(rng.randint(3, 12))) for _ in range(count)]


def read_unit(unit: Unit) -> list[str]:
    """The documents of a unit, large ones joined; a mistake in one is raised."""
    documents: list[str] = []
    continued = False
    for array, unfinished in unit.texts(raise_bad):
        found = array.to_pylist()
        if continued:
            documents[-1] += found.pop(0)
        documents += found
        continued = unfinished
    return documents


def write_jsonl(path: Path, count: int = 300) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(count)), encoding="utf-8")
    return path


def make_data(folder: Path, count: int = 300) -> Path:
    """`folder/data/tiny`: a prepared data folder with a vocabulary of 320."""
    source = write_jsonl(folder / "tiny.jsonl", count)
    prepare(str(source), "train:320", folder / "data" / "tiny", val_fraction=0.1)
    return folder / "data" / "tiny"


STEADY = Path(__file__).with_name("steady.yaml")  # a recipe whose numbers tests know

TINY_RECIPE = """
name: tiny
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, intermediate_size: 64, max_seq_len: 32}
data: {dataset: tiny}
train: {tokens: 5120, batch_tokens: 256, micro_batch_size: 2, seed: 7, device: cpu, dtype: float32}
optimizer: {name: adamw, lr: 1e-2}
schedule: {name: wsd, warmup: 10%, decay: 20%}
eval: {every: 2560, tokens: 1024, prompts: [The old], max_new_tokens: 8}
checkpoint: {every: 1280, keep_last: 2}
"""


def make_workspace(folder: Path, count: int = 300) -> Path:
    """The folder, with data/tiny and tiny.yaml in it."""
    make_data(folder, count)
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return folder


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write token ids as a shard, of uint32 for an array of that type."""
    dtype = np.dtype("<u4") if tokens.dtype == np.uint32 else np.dtype("<u2")
    path.write_bytes(shard_header(dtype, tokens.size) + tokens.astype(dtype).tobytes())
