"""Folders of shards that other programs wrote: those of llm.c and modded-nanogpt train as they are.

Their files are `<name>_train_000001.bin` and `<name>_val_000000.bin`, without a manifest. uint16 shards are taken to
hold GPT-2's tokens, as both programs' do, unless a tokenizer.json lies beside them.
"""

import re
from pathlib import Path

import numpy as np
import xxhash

from lightlm.data.shards import SPLITS, DataFolder, Manifest, ShardEntry, Split, TokenStream, open_shard
from lightlm.data.tokenizer import Tokenizer, load_tokenizer
from lightlm.errors import DataError

_NAME = re.compile(r".+_(train|val)_(\d+)\.bin")
CHECKED_TOKENS = 1_000_000  # at each shard's beginning; all of 100M would take seconds


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds shards named as llm.c and modded-nanogpt name them, and no manifest."""
    return not (folder / "manifest.json").exists() and any(_NAME.fullmatch(path.name) for path in folder.glob("*.bin"))


def open_foreign(folder: Path) -> DataFolder:
    """Open such a folder. Raises DataError where a shard or the tokenizer does not fit."""
    found = sorted((path for path in folder.glob("*.bin") if _NAME.fullmatch(path.name)), key=lambda path: path.name)
    shards = {path: open_shard(path) for path in found}
    tokenizer = _tokenizer(folder, shards)
    for path, tokens in shards.items():
        highest = int(tokens[:CHECKED_TOKENS].max(initial=0))
        if highest >= tokenizer.vocab_size:
            raise DataError(
                f"{path}: holds the token id {highest}, and the tokenizer has {tokenizer.vocab_size} entries; put the "
                f"tokenizer.json that the shards were made with into {folder}"
            )
    streams = {
        split: TokenStream([shards[path] for path in found if _split(path) == split], tokenizer.end_of_text_id)
        for split in SPLITS
    }
    return DataFolder(folder, _manifest(folder, shards, tokenizer), streams, tokenizer)


def _tokenizer(folder: Path, shards: dict[Path, np.ndarray]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(path)
    if any(tokens.dtype.itemsize > 2 for tokens in shards.values()):
        raise DataError(f"{folder} holds uint32 shards and no tokenizer.json; put the one they were made with there")
    try:
        return load_tokenizer("gpt2")
    except DataError as error:
        raise DataError(f"{folder} holds no tokenizer.json, and without one it means GPT-2's. {error}") from error


def _split(path: Path) -> Split:
    match = _NAME.fullmatch(path.name)
    return "val" if match is not None and match[1] == "val" else "train"


def _manifest(folder: Path, shards: dict[Path, np.ndarray], tokenizer: Tokenizer) -> Manifest:
    """What can be said of the shards without reading them all: documents and bytes of text are not counted."""
    entries = [
        ShardEntry(file=path.name, split=_split(path), tokens=len(tokens), documents=0, xxh3=_identity(path))
        for path, tokens in shards.items()
    ]
    return Manifest(
        source=str(folder),
        description="shards without a manifest, as llm.c and modded-nanogpt write them",
        revision=None,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        shards=entries,
        split_rule="by the names of the files",
        text_bytes=dict.fromkeys(SPLITS, 0),
        skipped_documents=0,
        unigram=None,
        lightlm_version="",
        settings={},
    )


def _identity(path: Path) -> str:
    """Tells shards apart, so that a run is not gone on with on other data: a hash of the size and both ends."""
    digest = xxhash.xxh3_64(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()
