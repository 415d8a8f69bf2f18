"""The lock of a run: one process at a time trains, replaces or deletes it. Reading a run needs no lock.

`.lock` is locked by the operating system, which unlocks it when the process ends, however it ends. `.lock.json` names
the process for messages. It means nothing while `.lock` is not locked, so a kill or a copy of the folder may leave it.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from lightlm import files
from lightlm.errors import CheckpointError
from lightlm.names import warn

_LOCK, _HOLDER = ".lock", ".lock.json"
_PATIENCE = 0.5  # seconds; `holder` takes the lock for an instant to see whether it is free


class RunLockedError(CheckpointError):
    """Another process trains the run."""


@dataclass(frozen=True)
class Holder:
    """The process that trains a run; `pid` 0 if it has not said so yet."""

    pid: int
    host: str

    def __str__(self) -> str:
        place = "this machine" if self.here else self.host
        return f"process {self.pid} on {place}" if self.pid else "another process"

    @property
    def here(self) -> bool:
        """Whether the process runs on this machine."""
        return self.host == socket.gethostname()

    @property
    def short(self) -> str:
        """The process as tables show it: its number, with the name of another machine."""
        return f"{self.pid or 'another'}" + ("" if self.here or not self.pid else f"@{self.host}")


@contextlib.contextmanager
def locked(run: Path, doing: str = "trained") -> Iterator[None]:
    """Context manager that keeps other processes from training, replacing or deleting a run; the folder must exist.

    `doing` says in messages what the process that holds it does with the folder.

    On a file system without locks, filelock creates `.lock` instead and deletes it at the end; where its version cannot
    do that, a warning says that nothing protects the run.

    Raises:
        RunLockedError: another process holds the lock.
    """
    lock = FileLock(run / _LOCK)
    try:
        has_locks = files.acquire(lock, timeout=_PATIENCE)
    except Timeout:
        raise RunLockedError(_refusal(run, _read_holder(run), doing, soft=isinstance(lock, SoftFileLock))) from None
    if not has_locks:
        warn(f"the file system of {run} has no locks: make sure that no other process trains this run")
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and what follows reports it
            files.write_text(run / _HOLDER, json.dumps(asdict(Holder(os.getpid(), socket.gethostname()))))
        yield
    finally:
        with contextlib.suppress(OSError):
            (run / _HOLDER).unlink(missing_ok=True)
        lock.release()


def holder(run: Path) -> Holder | None:
    """Return the process that trains a run, or None if none does."""
    if not (run / _LOCK).is_file():
        return None
    lock = FileLock(run / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _read_holder(run)
    except (OSError, NotImplementedError):  # no locks here, or a folder that only others may write
        return None
    lock.release()
    return None


def require_unlocked(run: Path) -> None:
    """Raise RunLockedError if another process trains the run."""
    if (found := holder(run)) is not None:
        raise RunLockedError(_refusal(run, found, "trained"))


def _read_holder(run: Path) -> Holder:
    try:
        values = json.loads((run / _HOLDER).read_text(encoding="utf-8"))
        return Holder(int(values["pid"]), str(values["host"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Holder(0, "")


def _refusal(run: Path, found: Holder, doing: str, *, soft: bool = False) -> str:
    remove = f", or delete {run / _LOCK} if that process has ended" if soft else ""
    return f"{run} is being {doing} by {found}; wait for it, or stop it first (Ctrl-C and SIGTERM save){remove}"
