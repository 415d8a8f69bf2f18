"""Pieces: the tokens of one block on disk, and the record that says what they are.

Everything is written under a temporary name and renamed, the record last, so a piece is whole or absent. Nothing is
forced to the disk: a record carries the checksums of its tokens, and a piece that lost some when the machine went down
is made again.
"""

import os
import platform
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from pydantic import BaseModel, Field

from lightlm.data.prepare.splitting import Candidate
from lightlm.data.shards import SPLITS, Split
from lightlm.files import checksum

TABLE = "table"
PARTS = (*SPLITS, TABLE)


def _zeros() -> dict[Split, int]:
    return dict.fromkeys(SPLITS, 0)


class Record(BaseModel):
    """What a piece holds.

    `first_unit`, `limit` and `only` say which block it is of; for `minima` and `border` see `splitting.Holder`;
    `source` is which part of a mixture it is of;
    `bad` are the first messages of `--skip-bad`; `flagged` counts documents that a filter only points out, `listed` are
    the first that filters found. `xxh3` is of the piece's files.
    """

    number: int
    first_unit: str
    limit: int | None
    only: bool
    source: int | None = None
    documents: int = 0
    tokens: dict[Split, int] = Field(default_factory=_zeros)
    text_bytes: dict[Split, int] = Field(default_factory=_zeros)
    xxh3: dict[str, str] = {}
    minima: list[Candidate] = []
    border: int | None = None
    dropped: dict[str, int] = {}
    bad: list[str] = []
    flagged: dict[str, int] = {}
    listed: list[str] = []

    @property
    def total_tokens(self) -> int:
        """Tokens of both splits."""
        return sum(self.tokens.values())


def piece_path(folder: Path, number: int, part: str) -> Path:
    """The file with a block's tokens of one split, or its table of documents; absent where there are none."""
    return folder / f"{number:08d}.{part}"


def record_path(folder: Path, number: int) -> Path:
    """The file with a piece's record."""
    return folder / f"{number:08d}.json"


def read_record(folder: Path, number: int) -> Record | None:
    """The record of a piece whose tokens are whole; None where there is none."""
    try:
        record = Record.model_validate_json(record_path(folder, number).read_bytes())
    except (OSError, ValueError):  # absent, or half of it after the machine went down
        return None
    for part, expected in record.xxh3.items():
        path = piece_path(folder, number, part)
        if not path.is_file() or checksum(path) != expected:
            return None
    return record


def remove_piece(folder: Path, number: int) -> None:
    """Delete a piece, its record first."""
    for path in (record_path(folder, number), *(piece_path(folder, number, part) for part in PARTS)):
        path.unlink(missing_ok=True)


class PieceWriter:
    """Writes one piece; it appears when the `with` block ends without an error."""

    def __init__(self, folder: Path, record: Record, dtype: np.dtype[Any]) -> None:
        self.record = record
        self.dtype = dtype
        self._folder = folder
        # Two machines may be at the same block, after a cluster gave one of them up for lost.
        self._mark = f"{platform.node()}-{os.getpid()}.partial"
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {part: xxhash.xxh3_64() for part in PARTS}

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for file in self._files.values():
            file.close()
        try:
            if kind is None:
                self._finish()
        finally:
            for name in (*self._files, "json"):
                self._temporary(name).unlink(missing_ok=True)

    def add(self, split: Split, tokens: np.ndarray) -> None:
        """Append tokens to a split."""
        if tokens.size:
            data = np.ascontiguousarray(tokens, self.dtype).data
            self._write(split, data)
            self._hashes[split].update(data)
            self.record.tokens[split] += tokens.size

    def add_rows(self, signatures: np.ndarray, tokens: np.ndarray, text_bytes: np.ndarray) -> None:
        """Append documents to the table: their signatures, (documents, hashes), tokens and bytes of text."""
        columns = (*signatures.T, tokens, text_bytes)
        data = np.stack([column.astype("<u8") for column in columns], axis=1).data  # uint64 and int64 make floats
        if data.nbytes:
            self._write(TABLE, data)
            self._hashes[TABLE].update(data)

    def spool(self, tokens: np.ndarray) -> None:
        """Keep tokens of a large document apart until its split is known."""
        self._write("spool", np.ascontiguousarray(tokens, self.dtype).data)

    def spooled(self) -> int:
        """How many tokens are kept apart."""
        return self._file("spool").tell() // self.dtype.itemsize

    def unspool(self, split: Split | None) -> None:
        """Append what was kept apart to a split, or forget it."""
        file = self._file("spool")
        file.seek(0)
        while split is not None and (data := file.read(1 << 24)):
            self.add(split, np.frombuffer(data, self.dtype))
        file.seek(0)
        file.truncate()

    def _finish(self) -> None:
        number = self.record.number
        for part in PARTS:
            target = piece_path(self._folder, number, part)
            if part in self._files:
                os.replace(self._temporary(part), target)
                self.record.xxh3[part] = self._hashes[part].hexdigest()
            else:
                target.unlink(missing_ok=True)
        self._temporary("json").write_text(self.record.model_dump_json(), encoding="utf-8")
        os.replace(self._temporary("json"), record_path(self._folder, number))

    def _write(self, name: str, data: memoryview) -> None:
        file, data = self._file(name), data.cast("B")
        while len(data):
            data = data[file.write(data) :]

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = self._temporary(name).open("w+b", buffering=0)
        return self._files[name]

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{self.record.number:08d}.{name}.{self._mark}"
