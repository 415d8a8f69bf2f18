"""`lightlm train --nproc N`: the same command in N local processes, with one error message and one exit code.

torchrun can start these processes as well. On one machine this launcher needs no rendezvous service, prints a
mistake as one message without the launcher's own traceback, keeps exit codes and does not import torch. It sets
torchrun's variables, so the processes behave alike under both.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from lightlm.cli.console import console
from lightlm.errors import LightLMError, is_out_of_memory
from lightlm.limits import cores
from lightlm.processes import THREADS_VARIABLE, python_command, python_environment
from lightlm.train.signals import describe_signal, handling

if TYPE_CHECKING:
    from lightlm.train.distributed import World

_RENDEZVOUS = "LIGHTLM_RENDEZVOUS"  # train.distributed.RENDEZVOUS; importing it would import torch
_LOST = "LIGHTLM_LOST"  # a file for what the first process was told that lost its connection to the others
_DONE, _INTERRUPTED = 0, 130
_PEER_LOST = 75  # PeerLostError.exit_code: an effect of another process's end, never the cause
_CRASHED = 70  # EX_SOFTWARE: an unexpected exception, whose traceback is printed
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0  # for the other processes to notice a failure, and again to obey SIGTERM
# Windows sends Ctrl-C and Ctrl-Break to every process of the console, and its `terminate` kills without a save.
_WORKERS_ARE_TOLD = os.name == "nt"


def launch(command: Sequence[str], restart: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run `lightlm COMMAND` in `processes` processes until all have ended, and return the exit code.

    When a process is killed or crashes, end the others and start all with `restart`, up to `max_restarts` times. A
    user's mistake causes no restart.
    """
    for attempt in range(max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="lightlm-") as folder:
            environment = _environment(processes, attempt, Path(folder))
            group = _Group(restart if attempt else command, processes, environment)
            rank, code = group.wait()
            told = Path(environment[_LOST])
            lost = f": {told.read_text(encoding='utf-8')}" if code == _PEER_LOST and told.is_file() else ""
        if group.interrupts:
            return _DONE if code == _DONE else _INTERRUPTED
        if code >= 0 and code not in (_PEER_LOST, _CRASHED):
            return code
        cause = f"process {rank} of {processes} {_describe(code)}{lost}"
        if attempt < max_restarts:
            then = f"restarting all from the last checkpoint ({attempt + 1} of {max_restarts})"
            console.print(f"[yellow]Note:[/] {escape(cause)}; {then}", soft_wrap=True)
        elif code != _CRASHED:
            then = "`lightlm train --resume` resumes from the last checkpoint"
            console.print(f"[bold red]Error:[/] {escape(cause)}; {then}", soft_wrap=True)
    return 1


def _environment(processes: int, attempt: int, folder: Path) -> dict[str, str]:
    """Return the environment that all processes share."""
    return {
        # Otherwise each process starts a thread for every core. A single one follows train.threads.
        **({THREADS_VARIABLE: str(max(1, cores() // processes))} if processes > 1 else {}),
        **python_environment(),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "lightlm",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        _LOST: str(folder / "lost"),
        # Torch takes the path as it is, but for Windows.
        _RENDEZVOUS: (folder / "rendezvous").as_uri() if os.name == "nt" else f"file://{folder / 'rendezvous'}",
    }


def _describe(code: int) -> str:
    if known := {_PEER_LOST: "lost its connection to the others", _CRASHED: "crashed"}.get(code):
        return known
    return f"was ended by {describe_signal(-code)}"


class _Group:
    """The running processes."""

    def __init__(self, arguments: Sequence[str], processes: int, environment: dict[str, str]) -> None:
        self.interrupts = 0
        self._workers: list[subprocess.Popen[bytes]] = []
        with handling(self._interrupt):
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                if rank:  # only the first process shows the warnings of libraries
                    own |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
                command, output = python_command("-m", "lightlm", *arguments), subprocess.DEVNULL if rank else None
                worker = subprocess.Popen(command, env=environment | own, stdin=subprocess.DEVNULL, stdout=output)
                self._workers.append(worker)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal as a request to save and stop; a second Ctrl-C kills all processes."""
        again = self.interrupts and number == signal.SIGINT
        self.interrupts += 1
        for worker in self._workers:
            if again:
                worker.kill()
            elif not _WORKERS_ARE_TOLD:
                worker.terminate()

    def wait(self) -> tuple[int, int]:
        """Wait for all processes; return rank and exit code (negative: a signal) of the one that caused the end."""
        ended: dict[int, int] = {}  # exit codes by rank, in the order noticed
        deadline, signals_sent = 0.0, 0
        with handling(self._interrupt):
            while len(ended) < len(self._workers):
                time.sleep(_POLL_SECONDS)
                codes = {rank: worker.poll() for rank, worker in enumerate(self._workers)}
                ended |= {rank: code for rank, code in codes.items() if code is not None and rank not in ended}
                failed = any(code not in (_DONE, _INTERRUPTED) for code in ended.values())
                # After an interruption, the processes have all the time they need to save.
                if not failed or time.monotonic() < deadline:
                    continue
                for worker in self._workers:
                    if signals_sent and worker.poll() is None:
                        worker.terminate() if signals_sent == 1 else worker.kill()
                deadline, signals_sent = time.monotonic() + _GRACE_SECONDS, signals_sent + 1
        precedence = {_PEER_LOST: 1, _INTERRUPTED: 2, _DONE: 3}  # any other code comes first
        return min(ended.items(), key=lambda end: precedence.get(end[1], 0))


@contextlib.contextmanager
def report_once(world: "World") -> Iterator[None]:
    """Context manager that lets only the first process that fails report its error; the others only exit."""
    launched = _RENDEZVOUS in os.environ
    try:
        yield
    except Exception as error:
        if isinstance(error, typer.Exit) or (world.size == 1 and not launched):
            raise
        known = isinstance(error, LightLMError | OSError) or is_out_of_memory(error)  # `main` prints each of these
        code = getattr(error, "exit_code", 1) if known else _CRASHED
        # The launcher itself reports a lost process: it knows which one ended, and why. If none did, the cause is what
        # the first one was told, such as an error of NCCL.
        if launched and code == _PEER_LOST:
            with contextlib.suppress(OSError), open(os.environ[_LOST], "x", encoding="utf-8") as file:
                file.write(str(error.__cause__ or error).strip())
        if not world.first("failure") or (launched and code == _PEER_LOST):
            raise SystemExit(code) from None
        if known:
            console.quiet = False
            raise
        traceback.print_exc()
        raise SystemExit(code) from None
