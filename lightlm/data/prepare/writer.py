"""Writing a split's tokens into shards as they come; what has been written can be gone on with after a kill."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import BaseModel

from lightlm.data.shards import ShardEntry, Split, shard_header
from lightlm.files import checksum


class WriterState(BaseModel):
    """Where a split's writer stands: its finished shards, and the tokens and ended documents in the open one."""

    entries: list[ShardEntry] = []
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0


class SplitWriter:
    """Appends tokens to `<split>_000000.bin`, `<split>_000001.bin`, ... of `shard_tokens` tokens each.

    Every shard but the last is exactly full, so a document may begin in one and end in the next.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        dtype: np.dtype[Any],
        end_of_text_id: int,
        shard_tokens: int,
        state: WriterState,
        token_counts: np.ndarray,
    ) -> None:
        """`state` and `token_counts` (int64 of shape (vocab_size,)) are gone on with, and kept up to date.

        What the open shard holds beyond `state` is cut off. Raises OSError.
        """
        self.state, self.token_counts = state, token_counts
        self._folder, self._split, self._dtype = folder, split, dtype
        self._end_of_text_id, self._shard_tokens = end_of_text_id, shard_tokens
        self._file: BinaryIO | None = None
        if state.tokens:
            self._file = self._path.open("r+b")
            self._file.truncate(len(shard_header(dtype, 0)) + state.tokens * dtype.itemsize)
            self._file.seek(0, os.SEEK_END)

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._split}_{len(self.state.entries):06d}.bin"

    def add(self, tokens: np.ndarray) -> None:
        """Append token ids of any documents, an end-of-text id after each document."""
        self.token_counts += np.bincount(tokens, minlength=len(self.token_counts))
        while tokens.size:
            room = self._shard_tokens - self.state.tokens
            self._append(tokens[:room])
            tokens = tokens[room:]
            if self.state.tokens == self._shard_tokens:
                self.close()

    def flush(self) -> None:
        """Force what has been added to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the open shard, if there is one, and enter it in `state.entries`."""
        if self._file is None:
            return
        state, path = self.state, self._path
        self._file.seek(0)
        self._file.write(shard_header(self._dtype, state.tokens))
        self.flush()
        self._file.close()
        # The header is known last, so the checksum costs a second reading, from the system's cache: 0.04 s for 200 MB.
        entry = ShardEntry(
            file=path.name, split=self._split, tokens=state.tokens, documents=state.documents, xxh3=checksum(path)
        )
        state.entries.append(entry)
        self._file, state.tokens, state.documents = None, 0, 0

    def abandon(self) -> None:
        """Close the open file without finishing it: Windows does not delete open files."""
        if self._file is not None:
            self._file.close()

    def _append(self, tokens: np.ndarray) -> None:
        if self._file is None:
            self._file = self._path.open("wb")
            self._file.write(shard_header(self._dtype, 0))
        self._file.write(np.ascontiguousarray(tokens, self._dtype).data)
        self.state.tokens += tokens.size
        self.state.documents += int(np.count_nonzero(tokens == self._end_of_text_id))
