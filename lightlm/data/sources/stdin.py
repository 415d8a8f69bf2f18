"""`lightlm prepare-data -`: text, JSON or Parquet from a pipe."""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import xxhash

from lightlm.data.readers.opening import first_text
from lightlm.data.readers.recognition import compression_of
from lightlm.data.readers.texts import BadRecord, Omitted, Stream, Texts, Unit
from lightlm.data.select.filters import Filter
from lightlm.data.sources.base import FileCounts
from lightlm.data.sources.local import LocalSource
from lightlm.errors import DataError, UsageError
from lightlm.files import explain_disk_errors

SPEC, NAME = "-", "stdin"
BLOCK_BYTES = 1 << 20
_JSON = re.compile(r'\s*(\{|(\[\s*)+([{"]|\]\s*\Z))')


class StandardInput(LocalSource):
    """A file with the content of standard input, identified by its hash."""

    def __init__(self, path: Path, digest: str, text_column: str, row_filter: Filter | None) -> None:
        super().__init__(path, text_column, row_filter)
        self.name, self.spec, self.description = NAME, SPEC, "standard input"
        self.revision = self.fingerprint = f"xxh3 {digest}"
        self.file_counts = FileCounts()

    def units(self) -> Iterator[Unit]:
        for unit in super().units():
            yield replace(unit, texts=partial(_without_copy, str(self._root), unit.texts))

    def check_unchanged(self) -> None:
        """Return: the copy is this process's own."""


def _without_copy(copy: str, stream: Stream, bad: BadRecord) -> Iterator[Texts]:
    """Yield the texts of a stream; its errors name standard input in place of the copy, which is removed."""

    def named(error: DataError) -> DataError:
        if not isinstance(error, Omitted):
            error.args = (str(error).replace(copy, "standard input"),)
        return error

    try:
        yield from stream(lambda error: bad(named(error)))
    except DataError as error:
        named(error)
        raise


@contextlib.contextmanager
def standard_input(folder: Path, text_column: str, row_filter: Filter | None = None) -> Iterator[StandardInput]:
    """Context manager for standard input as a source; see `suffix_for`.

    A source is read more than once (to train a tokenizer, to resume), so standard input is first copied to a file
    beside `folder`, which is removed at the end. Raises UsageError where standard input is a terminal, and DataError
    where it cannot be copied.
    """
    from filelock import FileLock, Timeout

    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("SOURCE - reads from a pipe, for example: zcat corpus.jsonl.gz | lightlm prepare-data -")
    folder = folder.absolute()
    spool = folder.with_name(f".{folder.name}.stdin")
    lock = FileLock(spool / "lock", timeout=0)
    with explain_disk_errors(folder):
        spool.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise DataError(
                f"Another `lightlm prepare-data -` is writing {folder}; wait for it, or name another folder with --out"
            ) from error
    try:
        digest, head = xxhash.xxh3_64(), b""
        with explain_disk_errors(folder):
            with (spool / "copy").open("wb") as file:
                while block := sys.stdin.buffer.read(BLOCK_BYTES):
                    head = block if not head.strip() else head
                    digest.update(block)
                    file.write(block)
            path = spool / f"stdin{suffix_for(head)}"
            os.replace(spool / "copy", path)
        yield StandardInput(path, digest.hexdigest(), text_column, row_filter)
    finally:
        shutil.rmtree(spool, ignore_errors=True)
        lock.release()


def suffix_for(head: bytes) -> str:
    """Return the suffix of a file with content that begins so.

    Parquet and compression are known by their signatures. Text is JSON where it begins with a brace, or with
    brackets and a brace or a quote: [{ or [". All other text is one document.
    """
    if head.startswith(b"PAR1"):
        return ".parquet"
    packed = compression_of(head) or ""
    text = first_text(head, packed)
    return (".jsonl" if _JSON.match(text) else ".txt") + packed
