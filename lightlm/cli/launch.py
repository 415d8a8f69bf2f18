"""`lightlm train --nproc N`: the same command in N local processes, with one voice and one exit code.

torchrun can start them just as well. Here one machine needs no rendezvous service, a mistake is one message
instead of a traceback of the launcher's, exit codes survive, and torch is not imported once more. The processes
are given torchrun's variables, so they need not know which of the two started them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from lightlm.cli.console import console
from lightlm.errors import LightLMError

if TYPE_CHECKING:
    from lightlm.train.distributed import World

LAUNCHED = "LIGHTLM_LAUNCHED"  # set in the processes that `launch` starts
_DONE, _INTERRUPTED = 0, 130
_PEER_LOST = 75  # PeerLostError.exit_code: an effect of another's end, never the cause
_CRASHED = 70  # EX_SOFTWARE: an unexpected exception, whose traceback is printed
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0  # that the others get to notice a failure, and again to follow SIGTERM


def launch(arguments: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run `lightlm ARGUMENTS` in `processes` processes until all are done; gives the command's exit code.

    When one is killed or crashes, the others are ended and all start again, up to `max_restarts` times; they go on
    from the last checkpoint of the run they had begun. Mistakes of the user are not tried again.
    """
    identity = uuid.uuid4().hex
    for attempt in range(max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="lightlm-") as folder:
            group = _Group(arguments, processes, _environment(processes, identity, attempt, Path(folder)))
            rank, code = group.wait()
        if group.interrupts:
            return _DONE if code == _DONE else _INTERRUPTED
        if code >= 0 and code not in (_PEER_LOST, _CRASHED):
            return code
        cause = f"process {rank} of {processes} {_describe(code)}"
        if attempt < max_restarts:
            console.print(
                f"[yellow]Note:[/] {escape(cause)}; restarting all from the last checkpoint "
                f"({attempt + 1} of {max_restarts})",
                soft_wrap=True,
            )
        elif code != _CRASHED:
            console.print(
                f"[bold red]Error:[/] {escape(cause)}; `lightlm train --resume` goes on from the last checkpoint",
                soft_wrap=True,
            )
    return 1


def _environment(processes: int, identity: str, attempt: int, folder: Path) -> dict[str, str]:
    """What all processes of a group share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        # Without a limit, each process would take a thread for every core.
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
        LAUNCHED: "1",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": identity,
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "LIGHTLM_RENDEZVOUS": (folder / "rendezvous").as_uri(),
    }


def _describe(code: int) -> str:
    if code == _PEER_LOST:
        return "lost its connection to the others"
    if code == _CRASHED:
        return "crashed"
    with contextlib.suppress(ValueError):
        hint = " (the system does this when memory runs out)" if code == -getattr(signal, "SIGKILL", 0) else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"
    return f"was ended by signal {-code}"


class _Group:
    """The running processes."""

    def __init__(self, arguments: Sequence[str], processes: int, environment: dict[str, str]) -> None:
        self.interrupts = 0
        self._workers: list[subprocess.Popen[bytes]] = []
        with self._signals():
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                if rank:  # what libraries have to say, the first says for all
                    own |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
                self._workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "lightlm", *arguments],
                        env=environment | own,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL if rank else None,
                    )
                )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass Ctrl-C and SIGTERM on as a request to save and stop; a second Ctrl-C ends all at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            again = self.interrupts and number == signal.SIGINT
            self.interrupts += 1
            for worker in self._workers:
                worker.kill() if again else worker.terminate()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wait(self) -> tuple[int, int]:
        """Wait for all to end: rank and exit code (below 0: the signal) of the one that decided the end."""
        ended: dict[int, int] = {}  # in the order noticed
        deadline, ending = 0.0, 0
        with self._signals():
            while len(ended) < len(self._workers):
                time.sleep(_POLL_SECONDS)
                for rank, worker in enumerate(self._workers):
                    if rank not in ended and (code := worker.poll()) is not None:
                        ended[rank] = code
                failed = any(code not in (_DONE, _INTERRUPTED) for code in ended.values())
                # Those that saved and stopped, or are about to, are given all the time they need.
                if not failed or time.monotonic() < deadline:
                    continue
                for worker in self._workers:
                    if ending and worker.poll() is None:
                        worker.terminate() if ending == 1 else worker.kill()
                deadline, ending = time.monotonic() + _GRACE_SECONDS, ending + 1
        causes = [(rank, code) for rank, code in ended.items() if code not in (_DONE, _INTERRUPTED, _PEER_LOST)]
        lost = [(rank, code) for rank, code in ended.items() if code == _PEER_LOST]
        stopped = [(rank, code) for rank, code in ended.items() if code == _INTERRUPTED]
        return [*causes, *lost, *stopped, (0, _DONE)][0]


@contextlib.contextmanager
def one_voice(world: "World") -> Iterator[None]:
    """Of the processes that fail, often all for one reason, let the first speak; the others only leave."""
    launched = LAUNCHED in os.environ
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if world.size == 1 and not launched:
            raise
        # OutOfMemoryError is torch's, which must not be imported for this; `main` has a message for each of these.
        known = isinstance(error, LightLMError | OSError) or type(error).__name__ == "OutOfMemoryError"
        code = getattr(error, "exit_code", 1) if known else _CRASHED
        # Of a lost process the launcher knows better which one it was, and why.
        if not world.first("failure") or (launched and code == _PEER_LOST):
            raise SystemExit(code) from None
        if not known:
            traceback.print_exc()
            raise SystemExit(code) from None
        console.quiet = False
        raise
