"""`lightlm prepare-data -`: text or JSON lines from a pipe."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lightlm.data.filters import Filter
from lightlm.data.sources import LocalSource
from lightlm.errors import UsageError

SPEC, NAME = "-", "stdin"
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
    `folder` first, which is removed at the end. Raises UsageError where standard input is a terminal.
    """
    if sys.stdin.isatty():
        raise UsageError("SOURCE - reads from a pipe, for example: zcat corpus.jsonl.gz | lightlm prepare-data -")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    spool = folder.with_name(f".{folder.name}.stdin")
    digest, start = xxhash.xxh3_64(), b""
    paths = [spool]
    try:
        with spool.open("wb") as file:
            while block := sys.stdin.buffer.read(BLOCK_BYTES):
                start = start or block.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
                digest.update(block)
                file.write(block)
        paths.append(spool.with_suffix(".jsonl" if start == b"{" else ".txt"))
        os.replace(*paths)
        yield StandardInput(paths[1], digest.hexdigest(), text_column, chosen)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
