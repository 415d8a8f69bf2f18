"""Encoded blocks: the tokens of one block on disk, with a JSON file that describes them.

Each file is written under a temporary name and renamed, the JSON file last, so an encoded block is complete or absent.
Nothing is forced to the disk. The JSON file holds the checksums of the others: a block that a power loss damaged is
encoded again.
"""

import os
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from pydantic import BaseModel, Field

from lightlm.data.shards import SPLITS, Split
from lightlm.files import checksum

DOCUMENTS = "documents"
MASKS: dict[Split, str] = {split: f"{split}.mask" for split in SPLITS}  # of conversations: a byte per token
DATA = (*SPLITS, DOCUMENTS, *MASKS.values())
COPY_TOKENS = 4_000_000


class LeftOut(BaseModel):
    """What was left out: documents by cause, and the first messages of `--skip-bad`; what filters found.

    `lost` counts what the tokenizer could not represent (see `lightlm.data.coverage`); empty for most tokenizers.

    `flagged` counts the documents that a filter reports and keeps; `listed` holds the first messages of filters.
    """

    dropped: dict[str, int] = {}
    bad: list[str] = []
    flagged: dict[str, int] = {}
    listed: list[str] = []
    lost: dict[str, int] = {}

    def drop(self, cause: str, documents: int = 1) -> None:
        """Count documents that are left out."""
        self.dropped[cause] = self.dropped.get(cause, 0) + documents

    def flag(self, cause: str, documents: int = 1) -> None:
        """Count documents that are kept and reported."""
        self.flagged[cause] = self.flagged.get(cause, 0) + documents

    def add(self, other: "LeftOut", messages: int) -> None:
        """Add the counts of `other`, and its messages up to a total of `messages` of each kind."""
        pairs = ((self.dropped, other.dropped), (self.flagged, other.flagged), (self.lost, other.lost))
        for counts, more in pairs:
            total = sorted((Counter(counts) + Counter(more)).items())
            counts.clear()
            counts.update(total)
        self.bad += other.bad[: max(0, messages - len(self.bad))]
        self.listed += other.listed[: max(0, messages - len(self.listed))]


class EncodedBlock(LeftOut):
    """What an encoded block holds.

    `first_unit` and `limit` identify the block that was encoded. `xxh3` maps the block's files to their checksums.
    """

    number: int
    first_unit: str
    limit: int | None
    documents: int = 0
    tokens: dict[Split, int] = Field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[Split, int] = Field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    xxh3: dict[str, str] = {}

    @property
    def total_tokens(self) -> int:
        """Tokens of both splits."""
        return sum(self.tokens.values())


def block_path(folder: Path, number: int, kind: str) -> Path:
    """Return the path of a block's tokens (`train`, `val`), its `documents` or its description (`json`).

    A file without content is absent.
    """
    return folder / f"{number:08d}.{kind}"


def read_encoded_block(folder: Path, number: int) -> EncodedBlock | None:
    """Return the description of an encoded block; None where it is absent or damaged."""
    try:
        encoded = EncodedBlock.model_validate_json(block_path(folder, number, "json").read_bytes())
    except (OSError, ValueError):  # absent, or damaged by a power loss
        return None
    for kind, expected in encoded.xxh3.items():
        path = block_path(folder, number, kind)
        if not path.is_file() or checksum(path) != expected:
            return None
    return encoded


def read_tokens(path: Path, dtype: np.dtype[Any], start: int, end: int) -> Iterator[np.ndarray]:
    """Yield the tokens from `start` to `end` of a file, `COPY_TOKENS` at a time."""
    with path.open("rb") as file:
        file.seek(start * dtype.itemsize)
        for first in range(start, end, COPY_TOKENS):
            yield np.fromfile(file, dtype, min(COPY_TOKENS, end - first))


def remove_encoded_block(folder: Path, number: int) -> None:
    """Delete an encoded block, its description first."""
    for kind in ("json", *DATA):
        block_path(folder, number, kind).unlink(missing_ok=True)


class EncodedBlockWriter:
    """Writes one encoded block, which appears when the `with` block ends without an error."""

    def __init__(self, folder: Path, encoded: EncodedBlock, dtype: np.dtype[Any]) -> None:
        self.encoded, self.dtype = encoded, dtype
        self._folder = folder
        # Two machines may encode the same block, after a cluster lost contact with one of them.
        self._suffix = f"{platform.node()}-{os.getpid()}.partial"
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {kind: xxhash.xxh3_64() for kind in DATA}

    def __enter__(self) -> "EncodedBlockWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for file in self._files.values():
            file.close()
        try:
            if kind is not None:
                return
            for name in DATA:
                target = block_path(self._folder, self.encoded.number, name)
                if name in self._files:
                    os.replace(self._temporary(name), target)
                    self.encoded.xxh3[name] = self._hashes[name].hexdigest()
                else:
                    target.unlink(missing_ok=True)
            self._temporary("json").write_text(self.encoded.model_dump_json(), encoding="utf-8")
            os.replace(self._temporary("json"), block_path(self._folder, self.encoded.number, "json"))
        finally:
            for name in (*self._files, "json"):
                self._temporary(name).unlink(missing_ok=True)

    def add(self, split: Split, tokens: np.ndarray, masks: np.ndarray | None = None) -> None:
        """Append tokens to a split, of conversations with their masks."""
        self._write(split, np.ascontiguousarray(tokens, self.dtype))
        if masks is not None:
            self._write(MASKS[split], np.ascontiguousarray(masks, np.uint8))
        self.encoded.tokens[split] += tokens.size

    def count(self, val: np.ndarray, text_bytes: np.ndarray) -> None:
        """Count documents: whether each is for validation and its bytes of text, both of shape (documents,)."""
        self.encoded.documents += len(val)
        self.encoded.text_bytes["val"] += int(text_bytes[val].sum())
        self.encoded.text_bytes["train"] += int(text_bytes[~val].sum())

    def add_documents(self, signatures: np.ndarray, tokens: np.ndarray, text_bytes: np.ndarray) -> None:
        """Append a row per document: its signature (documents, hashes), tokens and bytes of text."""
        columns = (*signatures.T, tokens, text_bytes)
        # One type for all columns: numpy turns a mix of uint64 and int64 into floats.
        self._write(DOCUMENTS, np.stack([column.astype("<u8") for column in columns], axis=1))

    def _write(self, kind: str, array: np.ndarray) -> None:
        if not array.size:
            return
        if kind not in self._files:
            self._files[kind] = self._temporary(kind).open("wb", buffering=0)
        data = array.data.cast("B")
        self._hashes[kind].update(data)
        while len(data):
            data = data[self._files[kind].write(data) :]

    def _temporary(self, kind: str) -> Path:
        return self._folder / f".{self.encoded.number:08d}.{kind}.{self._suffix}"
