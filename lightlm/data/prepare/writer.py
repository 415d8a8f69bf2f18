"""Writing one split's tokens into shards; a later process resumes from the saved state."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import BaseModel

from lightlm.data.prepare.encoded_block import read_tokens
from lightlm.data.shards import (
    HEADER_BYTES,
    MASK_BEGINS,
    MASK_DTYPE,
    MASK_SUFFIX,
    ShardEntry,
    Split,
    shard_header,
    token_dtype,
)
from lightlm.data.tokenizer import Tokenizer
from lightlm.files import checksum


class WriterState(BaseModel):
    """How far a split is written: its finished shards, the tokens and ended documents in the open one, and the bytes
    of text in all of them."""

    entries: list[ShardEntry] = []
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens in all shards."""
        return self.tokens + sum(entry.tokens for entry in self.entries)


class SplitWriter:
    """Appends tokens to `<split>_000000.bin`, `<split>_000001.bin`, ... of `shard_tokens` tokens each.

    Every shard but the last is full, so a document may begin in one and end in the next.
    """

    suffix, header_bytes = ".bin", HEADER_BYTES

    def __init__(
        self, folder: Path, split: Split, tokenizer: Tokenizer, shard_tokens: int, state: WriterState,
        token_counts: np.ndarray,
    ) -> None:  # fmt: skip
        """Resume from `state` and `token_counts` (int64 of shape (vocab_size,)), and keep both up to date.

        Cuts off what the shards hold beyond `state`. Raises OSError.
        """
        self.state, self.token_counts = state, token_counts
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._end_of_text_id, self._dtype = tokenizer.end_of_text_id, self._type(tokenizer)
        self._file: BinaryIO | None = None
        self.cut_files()

    def _type(self, tokenizer: Tokenizer) -> np.dtype[Any]:
        return token_dtype(tokenizer.vocab_size)

    def _header(self, count: int) -> bytes:
        return shard_header(self._dtype, count)

    def _documents(self, tokens: np.ndarray) -> int:
        return int(np.count_nonzero(tokens == self._end_of_text_id))

    def add(self, tokens: np.ndarray) -> None:
        """Append token ids of any documents, an end-of-text id after each document."""
        state = self.state
        self.token_counts += np.bincount(tokens, minlength=len(self.token_counts))
        while tokens.size:
            if self._file is None:
                self._file = self._path().open("wb")
                self._file.write(self._header(0))
            fitting = tokens[: self._shard_tokens - state.tokens]
            self._file.write(np.ascontiguousarray(fitting, self._dtype).data)
            state.tokens += fitting.size
            state.documents += self._documents(fitting)
            tokens = tokens[fitting.size :]
            if state.tokens == self._shard_tokens:
                self.close()

    def tail(self, count: int) -> Iterator[np.ndarray]:
        """Yield the last `count` tokens in parts."""
        self.flush()
        state = self.state
        sizes = [*(entry.tokens for entry in state.entries), state.tokens]
        start = state.total_tokens - count
        for number, size in enumerate(sizes):
            if start < size:
                header = self.header_bytes // self._dtype.itemsize
                yield from read_tokens(self._path(number), self._dtype, header + max(0, start), header + size)
            start -= size

    def forget_tail(self, count: int) -> None:
        """Take the last `count` tokens out of the state and the counts; `cut_files` then shortens the files."""
        state, kept = self.state, self.state.total_tokens - count
        for part in self.tail(count):
            self.token_counts -= np.bincount(part, minlength=len(self.token_counts))
        full = kept // self._shard_tokens
        last_shard = np.concatenate([*self.tail(state.total_tokens - full * self._shard_tokens)])
        state.entries, state.tokens = state.entries[:full], kept - full * self._shard_tokens
        state.documents = self._documents(last_shard[: state.tokens])

    def cut_files(self) -> None:
        """Shorten the open shard to the state's tokens, and delete the shards after it."""
        self.abandon()
        number = len(self.state.entries) + (self.state.tokens > 0)
        while (path := self._path(number)).exists():
            path.unlink()
            number += 1
        if self.state.tokens:
            self._file = self._path().open("r+b")
            self._file.truncate(self.header_bytes + self.state.tokens * self._dtype.itemsize)
            self._file.seek(0, os.SEEK_END)

    def flush(self) -> None:
        """Force what has been added to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the open shard, if there is one, and enter it in `state.entries`."""
        if self._file is None:
            return
        state, path = self.state, self._path()
        self._file.seek(0)
        self._file.write(self._header(state.tokens))
        self.flush()
        self._file.close()
        # The header needs the count, so the checksum takes a second pass: 0.04 s for 200 MB from the system's cache.
        entry = ShardEntry(
            file=path.name, split=self._split, tokens=state.tokens, documents=state.documents, xxh3=checksum(path)
        )
        state.entries.append(entry)
        self._file, state.tokens, state.documents = None, 0, 0

    def abandon(self) -> None:
        """Close the open file without finishing it: Windows does not delete open files."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, number: int | None = None) -> Path:
        """Return the path of a shard, of the open one by default."""
        return self._folder / f"{self._split}_{len(self.state.entries) if number is None else number:06d}{self.suffix}"


class MaskWriter(SplitWriter):
    """Appends the masks of a split's tokens to files beside its shards. A document is a conversation that begins."""

    suffix, header_bytes = MASK_SUFFIX, 0

    def _type(self, tokenizer: Tokenizer) -> np.dtype[Any]:
        return MASK_DTYPE

    def _header(self, count: int) -> bytes:
        return b""

    def _documents(self, tokens: np.ndarray) -> int:
        return int(np.count_nonzero(tokens & MASK_BEGINS))
