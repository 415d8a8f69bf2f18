"""`lightlm prepare-data -`: text or JSON lines from a pipe."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lightlm.data.select.filters import Filter
from lightlm.data.sources.local import LocalSource
from lightlm.errors import DataError, UsageError
from lightlm.files import clear_errors

SPEC, NAME = "-", "stdin"
BLOCK_BYTES = 1 << 20


class StandardInput(LocalSource):
    """A file with the content of standard input, identified by its hash."""

    def __init__(self, path: Path, digest: str, text_column: str, row_filter: Filter | None) -> None:
        super().__init__(path, text_column, row_filter)
        self.name, self.spec, self.description = NAME, SPEC, "standard input"
        self.revision = self.fingerprint = f"xxh3 {digest}"


@contextlib.contextmanager
def standard_input(folder: Path, text_column: str, row_filter: Filter | None = None) -> Iterator[StandardInput]:
    """Context manager for standard input as a source: JSON lines where it begins with a brace, else one text.

    A source is read more than once (to train a tokenizer, to resume), so standard input is first copied to a file
    beside `folder`, which is removed at the end. Raises UsageError where standard input is a terminal, and DataError
    where it cannot be copied.
    """
    from filelock import FileLock, Timeout

    if sys.stdin.isatty():
        raise UsageError("SOURCE - reads from a pipe, for example: zcat corpus.jsonl.gz | lightlm prepare-data -")
    folder = folder.absolute()
    spool = folder.with_name(f".{folder.name}.stdin")
    lock = FileLock(spool / "lock", timeout=0)
    with clear_errors(folder):
        spool.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise DataError(
                f"Another `lightlm prepare-data -` is writing {folder}; wait for it, or name another folder with --out"
            ) from error
    try:
        digest, start = xxhash.xxh3_64(), b""
        with clear_errors(folder):
            with (spool / "copy").open("wb") as file:
                while block := sys.stdin.buffer.read(BLOCK_BYTES):
                    start = start or block.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
                    digest.update(block)
                    file.write(block)
            path = spool / ("stdin.jsonl" if start == b"{" else "stdin.txt")
            os.replace(spool / "copy", path)
        yield StandardInput(path, digest.hexdigest(), text_column, row_filter)
    finally:
        shutil.rmtree(spool, ignore_errors=True)
        lock.release()
