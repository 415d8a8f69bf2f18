"""What readers need of a file: a `pathlib.Path` has it, and so has a file on the Hugging Face Hub."""

import errno
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol


class File(Protocol):
    """A file that can be hashed and pickled; `str()` names it in messages."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """The last part of the path."""

    def stat(self) -> Any:
        """Return at least `st_size`, in bytes, and `st_mtime_ns`, which changes when the content does."""

    def open(self, mode: Literal["rb"], buffering: int = ...) -> BinaryIO:
        """Open the file for reading; each read of an unbuffered remote file is a request."""


def is_local(file: File) -> bool:
    """Return whether reading the file again costs nothing."""
    return isinstance(file, Path)


_MACHINE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def raise_machine_fault(error: BaseException) -> None:
    """Raise a fault of this machine as it is: it says nothing about the file, so --skip-bad must not skip any of it."""
    if isinstance(error, OSError) and error.errno in _MACHINE_FAULTS:
        raise error
