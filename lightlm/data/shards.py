"""Token shards, the manifest, and token streams: the format on disk, documented in docs/data-format.md.

A shard is a header of 256 little-endian int32 (magic, version, token count, zeros) followed by the tokens: the format
of llm.c and modded-nanogpt.
"""

import itertools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from lightlm.errors import DataError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

HEADER_BYTES = 1024
# (magic, version) -> token type. The first is llm.c's GPT-2 format, the second its Llama 3 format.
FORMATS: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
LARGEST_UINT16_VOCABULARY = 65_536

# Bits of a token's byte in a mask: it is trained on, it begins a conversation.
MASK_TRAINED, MASK_BEGINS = 1, 2
MASK_SUFFIX, MASK_DTYPE, MASK_VALUES = ".mask", np.dtype(np.uint8), 4
FOUND_TOKENS = 1 << 22  # looked at together: 32 MB of memory
TrainOn = Literal["all", "assistant", "last"]

MIN_VAL_DOCUMENTS, MIN_VAL_TOKENS = 10, 20_000  # a smaller validation split is noted


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of a shard's tokens: uint16, or uint32 for a vocabulary above 65,536 entries."""
    return np.dtype("<u2") if vocab_size <= LARGEST_UINT16_VOCABULARY else np.dtype("<u4")


def shard_header(dtype: np.dtype[Any], count: int) -> bytes:
    """Return the 1,024 bytes before the tokens of a shard of `count` tokens."""
    magic, version = next(key for key, value in FORMATS.items() if value == dtype)
    return struct.pack("<3i", magic, version, count).ljust(HEADER_BYTES, b"\0")


def open_shard(path: Path) -> np.ndarray:
    """Return the tokens of a shard, memory-mapped: uint16 or uint32 of shape (count,).

    Raises DataError for a file that is missing, is not a shard, or does not have the length in its header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Prepare the data again with --overwrite."
        ) from error
    magic, version, count = struct.unpack("<3i", header[:12].ljust(12, b"\0"))
    dtype = FORMATS.get((magic, version))
    if len(header) < HEADER_BYTES or dtype is None:
        known = " or ".join(f"{m} version {v} ({d.name})" for (m, v), d in FORMATS.items())
        raise DataError(
            f"{path}: not a token shard: {size} bytes, magic {magic} version {version}; expected {known} in a header "
            f"of {HEADER_BYTES} bytes."
        )
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        raise DataError(
            f"{path}: {size} bytes, but the {count} tokens in its header take {expected}; the file is truncated or "
            "damaged. Copy it again, or prepare the data again with --overwrite."
        )
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


def open_mask(path: Path, tokens: int) -> np.ndarray:
    """Return the masks of a shard's tokens, memory-mapped: uint8 of shape (tokens,). Raises DataError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Prepare the data again with --overwrite."
        ) from error
    if size != tokens:
        raise DataError(
            f"{path}: {size} bytes, but its shard has {tokens} tokens; the file is truncated or damaged. Copy it "
            "again, or prepare the data again with --overwrite."
        )
    return np.memmap(path, dtype=np.uint8, mode="r", shape=(tokens,)) if tokens else np.zeros(0, np.uint8)


class ShardEntry(BaseModel):
    """One shard in the manifest. `documents` counts its end-of-text tokens, so the documents that end in it.

    The mask beside a shard has an entry, too: its tokens, and the conversations that begin in it.
    """

    file: str
    split: Split
    tokens: int
    documents: int
    xxh3: str


class UnigramEntropy(BaseModel):
    """Cross-entropy of the validation tokens under the train unigram distribution; a model must do better."""

    nats_per_token: float
    bits_per_byte: float


class ChatData(BaseModel):
    """What the manifest of conversations says more.

    Attributes:
        template: where the chat template comes from: `tokenizer`, `chatml`, or a file.
        added_tokens: the special tokens that the tokenizer lacked for it.
        trained_tokens: by split.
        masks: beside each shard, a file with a byte per token; see `MASK_TRAINED`.
    """

    train_on: TrainOn
    template: str
    added_tokens: list[str] = []
    trained_tokens: dict[Split, int]
    masks: list[ShardEntry]


class Manifest(BaseModel):
    """The content of `manifest.json`; `text_bytes` is UTF-8 bytes of text per split.

    What an earlier version also wrote is ignored.
    """

    format: Literal[1] = 1
    source: str
    description: str
    revision: str | None = None
    tokenizer_sha256: str
    vocab_size: int
    end_of_text_id: int
    end_of_text: str = ""  # its characters; an older version does not write them
    shards: list[ShardEntry]
    split_rule: str
    text_bytes: dict[Split, int]
    skipped_documents: int = 0
    dropped: dict[str, int] = {}
    bad: list[str] = []
    flagged: dict[str, int] = {}
    listed: list[str] = []
    lost: dict[str, int] = {}
    evaluation_sets: dict[str, dict[str, int]] = {}
    files_read: dict[str, int] = {}
    files_left_out: dict[str, int] = {}
    unigram: UnigramEntropy | None = None
    chat: ChatData | None = None
    lightlm_version: str = ""
    settings: dict[str, str | int | float | None] = {}
    # Not in the file: set by `prepare` if the folder was already finished.
    already_prepared: bool = Field(default=False, exclude=True)

    def tokens(self, split: Split) -> int:
        """Return the tokens in a split, end-of-text tokens included."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def documents(self, split: Split) -> int:
        """Return the documents in a split."""
        shards = self.shards if self.chat is None else self.chat.masks
        return sum(shard.documents for shard in shards if shard.split == split)

    @property
    def small_validation(self) -> str:
        """The size of a validation split whose loss says little, in words; empty for a larger one, or none.

        The loss per token differs by some 0.4 nats between documents and 3 between tokens, so 10 documents and 20,000
        tokens give a mean that is known to about 0.1 and 0.02. A source of few documents is judged only by tokens.
        """
        tokens, documents = self.tokens("val"), self.documents("val")
        few_documents = 0 < documents < MIN_VAL_DOCUMENTS and self.documents("train") >= 10 * MIN_VAL_DOCUMENTS
        if not tokens or not (few_documents or tokens < MIN_VAL_TOKENS):
            return ""
        size = f"{tokens:,} token{'s' * (tokens != 1)}"
        return f"{documents:,} document{'s' * (documents != 1)}, {size}" if documents else size

    @property
    def suggested_val_fraction(self) -> float:
        """A share of documents that gives validation about twice what `small_validation` asks for, at most 0.1."""
        tokens = self.tokens("train") + self.tokens("val")
        documents = self.documents("train") + self.documents("val")
        wanted = 2 * max(MIN_VAL_TOKENS / max(1, tokens), MIN_VAL_DOCUMENTS / max(1, documents))
        return min(0.1, math.ceil(100 * wanted) / 100)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, over both splits."""
        return sum(self.text_bytes.values()) / max(1, sum(shard.tokens for shard in self.shards))


class JoinedArrays:
    """The shards of one split as one array that stays on disk. `dtype` is that of its parts in memory."""

    def __init__(self, shards: Sequence[np.ndarray], dtype: np.dtype[Any]) -> None:
        self._shards, self.dtype = shards, dtype
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def slice(self, start: int, count: int) -> np.ndarray:
        """Return `count` entries from position `start`, across shards, of shape (count,).

        Raises IndexError where the stream ends before.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of a stream of {len(self)}")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, start + count, side="left"))
        out = np.empty(count, self.dtype)
        for shard, begin in zip(self._shards[first:last], self._starts[first:last].tolist(), strict=True):
            part = shard[max(0, start - begin) : start + count - begin]
            place = max(0, begin - start)
            out[place : place + len(part)] = part
        return out


class TokenStream(JoinedArrays):
    """The tokens of one split; slices are int64.

    Attributes:
        mask: of conversations, a stream of a byte per token, see `MASK_TRAINED`; None for text.
    """

    def __init__(self, shards: list[np.ndarray], end_of_text_id: int, masks: list[np.ndarray] | None = None) -> None:
        super().__init__(shards, np.dtype(np.int64))
        self.mask = None if masks is None else TokenStream(masks, end_of_text_id)
        self.end_of_text_id = end_of_text_id

    def found(self, bit: int) -> Iterator[np.ndarray]:
        """Yield where a stream of masks has a bit set, block by block: int64 positions, in order."""
        for start in range(0, len(self), FOUND_TOKENS):
            yield np.flatnonzero(self.slice(start, min(FOUND_TOKENS, len(self) - start)) & bit) + start

    def find(self, bit: int) -> np.ndarray:
        """Return all positions of `found`."""
        return np.concatenate([np.zeros(0, np.int64), *self.found(bit)])

    def document_starts(self) -> np.ndarray:
        """Return where documents begin, int64 positions in order: at an end-of-text token, or as the masks say."""
        if self.mask is not None:
            return self.mask.find(MASK_BEGINS)
        block = 1 << 20
        found = [
            np.flatnonzero(self.slice(start, min(block, len(self) - start)) == self.end_of_text_id) + start
            for start in range(0, len(self), block)
        ]
        starts = np.concatenate([np.zeros(0, np.int64), *found])
        return starts if len(starts) and not starts[0] else np.concatenate([np.zeros(1, np.int64), starts])

    def holds_documents(self) -> bool:
        """Return whether an end-of-text token separates two documents, in other words whether more follows one.

        Of conversations, whether there are two.
        """
        if self.mask is not None:
            return len(self.mask.find(MASK_BEGINS)) > 1
        block = 1 << 20
        return any(
            (self.slice(start, min(block, len(self) - 1 - start)) == self.end_of_text_id).any()
            for start in range(0, len(self) - 1, block)
        )

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the int64 token ids of each document, without the end-of-text token; of each conversation, all of them.

        The token may be before each document (modded-nanogpt) or after it.
        """
        if self.mask is not None:
            starts = self.mask.find(MASK_BEGINS).tolist()
            for start, end in itertools.pairwise([*starts, len(self)]):
                yield self.slice(start, end - start)
            return
        parts: list[np.ndarray] = []
        for start in range(0, len(self), 1 << 20):
            block = self.slice(start, min(1 << 20, len(self) - start))
            *closed, rest = np.split(block, np.flatnonzero(block == self.end_of_text_id) + 1)
            for ended in closed:
                document = np.concatenate([*parts, ended[:-1]])
                parts = []
                if document.size:
                    yield document
            parts.append(rest)
        tail = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        if tail.size:
            yield tail


def streams_of(manifest: Manifest, shards: Mapping[str, np.ndarray]) -> dict[Split, TokenStream]:
    """Return the stream of each split from the tokens of the manifest's shards and masks, keyed by file name."""
    masks = None if manifest.chat is None else manifest.chat.masks
    return {
        split: TokenStream(
            [shards[entry.file] for entry in manifest.shards if entry.split == split],
            manifest.end_of_text_id,
            None if masks is None else [shards[entry.file] for entry in masks if entry.split == split],
        )
        for split in SPLITS
    }
