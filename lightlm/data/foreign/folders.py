"""Shards from other programs: LightLM trains on those of llm.c and modded-nanogpt as they are.

Their files are `<name>_train_000001.bin` and `<name>_val_000000.bin`, without a manifest. uint16 shards hold GPT-2's
tokens, as in both programs, unless the folder has a tokenizer.json.
"""

import re
from pathlib import Path

import numpy as np
import xxhash

from lightlm.data.shards import SPLITS, Manifest, ShardEntry, Split, TokenStream, open_shard, streams_of
from lightlm.data.sources.hub.client import download_tokenizer
from lightlm.data.tokenizer import Tokenizer, load_tokenizer
from lightlm.errors import DataError

_NAME = re.compile(r".+_(train|val)_(\d+)\.bin")
CHECKED_TOKENS = 1_000_000  # of each shard; all 100M would take seconds


def read_foreign(folder: Path) -> tuple[Manifest, dict[Split, TokenStream], Tokenizer] | None:
    """Read a folder of shards named as by llm.c and modded-nanogpt; None for another, or one with a manifest.

    The manifest says what is known without reading all shards: documents and bytes of text are not counted. Raises
    DataError where a shard and the tokenizer do not match.
    """
    if not (splits := foreign_splits(folder)):
        return None
    shards = {name: open_shard(folder / name) for name in splits}
    tokenizer = _tokenizer(folder, shards)
    for name, tokens in shards.items():
        highest = int(tokens[:CHECKED_TOKENS].max(initial=0))
        if highest >= tokenizer.vocab_size:
            raise DataError(
                f"{folder / name}: holds the token id {highest}, but the tokenizer has {tokenizer.vocab_size} entries; "
                f"copy the tokenizer.json of the shards into {folder}"
            )
    manifest = Manifest(
        source=str(folder),
        description="shards without a manifest, as llm.c and modded-nanogpt write them",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        shards=[
            ShardEntry(file=name, split=split, tokens=len(shards[name]), documents=0, xxh3=_identity(folder / name))
            for name, split in splits.items()
        ],
        split_rule="by the names of the files",
        text_bytes=dict.fromkeys(SPLITS, 0),
    )
    return manifest, streams_of(manifest, shards), tokenizer


def foreign_splits(folder: Path) -> dict[str, Split]:
    """Return the split of each shard by its file name; none for a folder of other files, or one with a manifest."""
    if (folder / "manifest.json").exists():
        return {}
    matches = map(_NAME.fullmatch, sorted(path.name for path in folder.glob("*.bin")))
    return {match[0]: "val" if match[1] == "val" else "train" for match in matches if match}


def _tokenizer(folder: Path, shards: dict[str, np.ndarray]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        return Tokenizer.read(path)
    if any(tokens.dtype.itemsize > 2 for tokens in shards.values()):
        raise DataError(f"{folder} holds uint32 shards and no tokenizer.json; copy the one of the shards there")
    try:
        return load_tokenizer("gpt2", download_tokenizer)
    except DataError as error:
        raise DataError(f"{folder} holds no tokenizer.json, so its shards need GPT-2's. {error}") from error


def _identity(path: Path) -> str:
    """Hash the size and both ends of a shard, so that a run does not resume on other data."""
    digest = xxhash.xxh3_64(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()
