"""`lightlm prepare-data -`: text or JSON lines from a pipe."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lightlm.data.select.filters import Filter
from lightlm.data.sources.local import LocalSource
from lightlm.errors import DataError, UsageError
from lightlm.files import clear_errors

SPEC, NAME = "-", "stdin"
SUFFIXES = (".txt", ".jsonl")
BLOCK_BYTES = 1 << 20


class StandardInput(LocalSource):
    """What came from the pipe, in a file; known by its content."""

    def __init__(self, path: Path, digest: str, text_column: str, chosen: Filter | None) -> None:
        super().__init__(path, text_column, chosen)
        self.name, self.spec, self.description = NAME, SPEC, "standard input"
        self.revision = self.fingerprint = f"xxh3 {digest}"


@contextlib.contextmanager
def standard_input(folder: Path, text_column: str, chosen: Filter | None = None) -> Iterator[StandardInput]:
    """Standard input as a source: JSON lines where it begins with a brace, else one text.

    A source is read more than once (to train a tokenizer, to go on after a kill), so it is copied to a file beside
    `folder` first, which is removed at the end. Raises UsageError where standard input is a terminal, and
    DataError where it cannot be copied.
    """
    if sys.stdin.isatty():
        raise UsageError("SOURCE - reads from a pipe, for example: zcat corpus.jsonl.gz | lightlm prepare-data -")
    folder = folder.absolute()
    with _own(folder.with_name(f".{folder.name}.stdin"), folder) as spool:
        with clear_errors(folder):
            path, digest = _copied(spool)
        yield StandardInput(path, digest, text_column, chosen)


@contextlib.contextmanager
def _own(spool: Path, folder: Path) -> Iterator[Path]:
    """Keep other processes from `spool`, and remove what is made of it. Raises DataError where one is at work."""
    from filelock import FileLock, Timeout

    lock = FileLock(_beside(spool, ".lock"), timeout=0)
    with clear_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise DataError(
                f"Another `lightlm prepare-data -` is writing {folder}; wait for it, or choose another folder with "
                "--out"
            ) from error
    try:
        yield spool
    finally:
        for path in (spool, *(_beside(spool, suffix) for suffix in SUFFIXES)):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Windows removes it at the release
            Path(lock.lock_file).unlink()
        lock.release()


def _beside(spool: Path, suffix: str) -> Path:
    return spool.with_name(spool.name + suffix)


def _copied(spool: Path) -> tuple[Path, str]:
    """A file with all of standard input, and its hash."""
    digest, start = xxhash.xxh3_64(), b""
    with spool.open("wb") as file:
        while block := sys.stdin.buffer.read(BLOCK_BYTES):
            start = start or block.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            digest.update(block)
            file.write(block)
    path = _beside(spool, SUFFIXES[start == b"{"])
    os.replace(spool, path)
    return path, digest.hexdigest()
