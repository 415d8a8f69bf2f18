"""Signals that ask a command to end: Ctrl-C, SIGTERM, a closed terminal (SIGHUP), and Windows' Ctrl-Break."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

# SIGBREAK is Ctrl-Break, and also what a console program gets when its window closes. A system has one of the two.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


@contextlib.contextmanager
def handling(handle: Callable[[int, FrameType | None], None], names: Sequence[str] = _NAMES) -> Iterator[None]:
    """Context manager in which `handle` receives these signals, which ask a process to end.

    SIGHUP stays ignored if it was, which is what `nohup` asks for. Only the main thread receives signals; in another
    thread this does nothing.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Context manager and decorator in which the other signals interrupt at once, as Ctrl-C does.

    Only the first one does: systemd and closing terminals send two, and the second must not interrupt the cleanup.
    Processes forked meanwhile end without a traceback: a library's pool of workers ends them by SIGTERM.
    """
    received, owner = [], os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    with handling(interrupt, _NAMES[1:]):
        yield


@contextlib.contextmanager
def stop_on_signals(*, launched: bool = False) -> Iterator[threading.Event]:
    """Return an event that these signals set; a second one is ignored, but a second Ctrl-C interrupts at once.

    Args:
        launched: whether a launcher started this process. It repeats the first Ctrl-C to its processes, so they
            ignore a second one; the launcher ends them.
    """
    stop, received = threading.Event(), []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            stop.set()  # takes a lock: a signal that interrupts this call must not do the same
        elif number == signal.SIGINT and not launched:
            raise KeyboardInterrupt

    with handling(handle):
        yield stop


def describe_signal(number: int) -> str:
    """Return the name of a signal that ended a process, with what it usually means."""
    hint = " (the system does this when memory runs out)" if number == getattr(signal, "SIGKILL", 0) else ""
    try:
        return f"{signal.Signals(number).name}{hint}"
    except ValueError:
        return f"signal {number}"
