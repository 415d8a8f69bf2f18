"""The command line's streams: messages and progress go to standard error, results to standard output.

A stream that cannot be written never ends a command: its reader may have left (`| head`, a killed `tee`), its terminal
may be closed, its disk full. What cannot be written is dropped.
"""

import errno
import io
import json
import os
import select
import sys
from collections.abc import Container, Iterable, Sequence
from typing import Any

from rich.console import Console

# Of several processes that train, only the first prints.
_silent = os.environ.get("RANK", "0") != "0" and "train" in sys.argv[1:2]
# A text such as train:100: is not an emoji.
console = Console(stderr=True, highlight=False, emoji=False, quiet=_silent)
out = Console(highlight=False, emoji=False, quiet=_silent)


class _Unfailing(io.RawIOBase):
    """A standard stream that drops what it cannot write. `failure` is the first error."""

    def __init__(self, stream: io.TextIOWrapper, raw: io.RawIOBase) -> None:
        self._raw, self.name = raw, stream.name
        self._owner = stream  # which closes `raw` once nothing refers to it
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            # Another program on the same terminal or pipe may have made it non-blocking; None says that it is full.
            while (written := self._raw.write(data)) is None:
                select.select([], [self._raw], [])
            return written
        except OSError as error:
            self.failure = self.failure or error
            return len(data)

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def writable(self) -> bool:
        return True


def guard_streams() -> None:
    """Replace standard output and error by streams whose writes never fail; a closed one leads to the null device.

    A character that the encoding lacks, such as one that a model generated, becomes a mark.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file opened gets this number, and what is printed lands in it
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        raw = getattr(stream.buffer, "raw", stream.buffer)
        if isinstance(raw, _Unfailing) or not isinstance(raw, io.RawIOBase):  # a test's stream in memory
            stream.reconfigure(errors="replace")
            continue
        unbuffered = stream.write_through
        stream.flush()
        guarded = io.TextIOWrapper(
            io.BufferedWriter(_Unfailing(stream, raw)),
            encoding=stream.encoding,
            errors="replace",
            line_buffering=stream.line_buffering,
            write_through=unbuffered,
        )
        setattr(sys, name, guarded)


def lost_output() -> OSError | None:
    """Return why results on standard output were dropped, or None; a reader that left has read what it wanted."""
    sys.stdout.flush()
    failure = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)
    return None if failure is None or failure.errno == errno.EPIPE else failure


def reader_left() -> bool:
    """Return whether the program that reads standard output has closed it, as `head` does."""
    failure = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)
    return failure is not None and failure.errno == errno.EPIPE


def write_utf8() -> None:
    """Let standard output write UTF-8 whatever the locale: a model's text has any characters, and files no locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # without `errors`, they would become strict


def print_json(document: Any) -> None:
    """Print the one JSON document that `--json` promises on standard output, in UTF-8."""
    if not out.quiet:
        write_utf8()
        print(json.dumps(document, indent=2, ensure_ascii=False, default=str))


_LEAST_WRAPPED = 16  # characters of a column whose texts wrap


def print_table(
    rows: Iterable[Sequence[str]],
    *headings: str,
    right: Container[int] = (),
    whole: Container[int] = (),
    **style: Any,
) -> None:
    """Print a table of texts, in which brackets are not markup; `style` goes to rich's `Table`.

    Columns numbered in `right` are right-aligned; these and those in `whole` never wrap.
    """
    from rich.cells import cell_len
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, title_justify="left", show_header=bool(headings), **style)
    for row in rows:
        table.add_row(*map(Text, row))
    for i, column in enumerate(table.columns):
        column.justify, column.overflow = "right" if i in right else "left", "fold"
        column.no_wrap = i in right or i in whole
        longest = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
        column.min_width = longest if column.no_wrap else min(longest, _LEAST_WRAPPED)
    # Where the terminal is narrower than the unwrapped columns, it wraps lines; rich would cut off their ends.
    least = Measurement.get(out, out.options.update(max_width=10_000), table).minimum
    table.width = least if least > out.width else table.width
    out.print(table, crop=False)
