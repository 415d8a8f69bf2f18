"""Ctrl-C and SIGTERM as a request to stop before the next micro-batch."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context manager in which `handle` receives Ctrl-C and SIGTERM."""
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_on_signals(*, launched: bool = False) -> Iterator[threading.Event]:
    """Return an event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts at once.

    Only the main thread receives signals; in another thread nothing sets the event.

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

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    with handling(handle):
        yield stop
