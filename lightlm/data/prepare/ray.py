"""Blocks encoded by a Ray cluster: the function that threads run, as tasks over storage that every node sees.

Only blocks and records travel; texts are read, and pieces written, by the node that has the task. A piece is whole or
absent (see `encoded_block.py`), so a task may die at any instant and run again elsewhere, even twice at once.
"""

import contextlib
import importlib.util
import logging
import os
import platform
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightlm import __version__
from lightlm.data.prepare.blocks import Block, Job
from lightlm.data.prepare.encode import Report
from lightlm.data.prepare.encoded_block import Record, piece_path, record_path
from lightlm.data.prepare.executors import done_or_encoded
from lightlm.errors import DataError, LightLMError, UsageError

RETRIES = 3  # of a block whose worker or node was lost; a block that kills every worker must end
ARRIVAL_SECONDS = 10.0  # until what another node wrote must be seen here: network file systems keep listings a while
KNOCK_SECONDS = 10.0
CANCEL_SECONDS = 5.0  # until cancelled tasks that have not stopped are killed
SHARED = "With --engine ray the source and the folder to write (--out) must be on storage that has the same path on all"


class RayEngine:
    """Tasks of one CPU each, at most `tasks` of them at once (default: as many as the cluster has CPUs).

    Uses the connection of this process to Ray where there is one. Otherwise connects to `address`; without one, to
    RAY_ADDRESS or a Ray that was started on this machine, or else starts one here for as long as the work takes.
    """

    def __init__(self, tasks: int | None = None, address: str | None = None) -> None:
        """Raises UsageError where Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise UsageError("--engine ray needs Ray, which is not installed. Install it: pip install 'lightlm[ray]'")
        self._tasks, self._address = tasks, address

    def __call__(self, job: Job, blocks: Iterator[Block], report: Report) -> Generator[Record, None, None]:
        with _connected(self._address) as ray:
            most = self._tasks or max(1, int(ray.cluster_resources().get("CPU", 1)))
            task = ray.remote(num_cpus=1, max_retries=RETRIES)(encode_here)
            shared = ray.put(job)  # once, however many blocks
            waiting: deque[Any] = deque()  # in the order of the blocks
            running: list[Any] = []
            try:
                while True:
                    # Up to as many again may be done and wait for an earlier one, which may have lost its worker.
                    while len(running) < most and len(waiting) < 2 * most and (block := next(blocks, None)):
                        waiting.append(task.remote(shared, block, __version__))
                        running.append(waiting[-1])
                    if not waiting:
                        return
                    if running:
                        _, running = ray.wait(running, timeout=None if waiting[0] in running else 0)
                    if waiting[0] not in running:
                        record = _result(ray, waiting.popleft())
                        _expect_piece(job.folder, record)
                        report(record.documents, sum(record.text_bytes.values()), record.total_tokens)
                        yield record
            finally:
                _cancel(ray, running)


def encode_here(job: Job, block: Block, version: str) -> Record:
    """What a task does, in a worker somewhere."""
    # `tokenizers` would otherwise use every core of the node in each of its tasks.
    os.environ["RAYON_NUM_THREADS"] = "1"
    if __version__ != version:
        raise DataError(
            f"The Ray node {platform.node()} has LightLM {__version__}, and this machine {version}; both must be the "
            "same."
        )
    # A source that is missing here would otherwise be as many bad records, and left out by --skip-bad.
    for path in (job.tokenizer, *_files(block.units[0].stream)):
        if not path.exists():
            raise DataError(f"The Ray node {platform.node()} has no {path}. {SHARED} nodes.")
    return done_or_encoded(job, block)


def _files(stream: object) -> Iterator[Path]:
    """The local files that a reader was made with."""
    if isinstance(stream, partial):
        yield from _files(stream.func)
        for argument in (*stream.args, *stream.keywords.values()):
            if isinstance(argument, Path):
                yield argument
            else:
                yield from _files(argument)


def _result(ray: Any, reference: Any) -> Record:
    """A task's record. What went wrong in it is raised as if it had been here."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (LightLMError, OSError)) and not isinstance(error.cause, ConnectionError):
            raise error.cause from None
        missing = _missing_module(error)
        if missing is None:
            raise
        raise DataError(
            f"A Ray worker has no Python module {missing}. Every node needs the same packages as this machine: "
            "pip install 'lightlm[ray]' there, in the Python that Ray runs in."
        ) from error
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise DataError(
            f"Ray lost a task {RETRIES + 1} times, or the cluster ({type(error).__name__}: {' '.join(lines[:2])})."
        ) from error


def _missing_module(error: Exception) -> str | None:
    """The module that a task failed to import, as Ray's message has it; None for another error."""
    _, found, rest = str(error).rpartition("No module named ")
    return rest.split()[0].strip("'\".;") if found else None


def _expect_piece(folder: Path, record: Record) -> None:
    """Raises DataError where this machine does not come to see what a task says that it wrote."""
    paths = [record_path(folder, record.number), *(piece_path(folder, record.number, split) for split in record.xxh3)]
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while absent := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise DataError(f"A Ray task has written {absent[0]}, which is not here. {SHARED} nodes and this machine.")
        time.sleep(0.1)


def _cancel(ray: Any, running: list[Any]) -> None:
    """Stop tasks: by an exception, on which they clear away what they have begun, and by force if that is too slow."""
    if not running:
        return
    with contextlib.suppress(ray.exceptions.RayError):
        for reference in running:
            ray.cancel(reference)
        _, left = ray.wait(running, num_returns=len(running), timeout=CANCEL_SECONDS)
        for reference in left:
            ray.cancel(reference, force=True)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The `ray` module with a connection to a cluster. Raises DataError where there is none to be had."""
    with _signals_kept():
        ray, ours = _connect(address)
    if not ours:
        yield ray
        return
    try:
        with _silenced(ray):
            yield ray
    finally:
        ray.shutdown()


def _connect(address: str | None) -> tuple[Any, bool]:
    """The `ray` module, connected, and whether the connection is new."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it prints a warning about GPUs
    import ray

    if ray.is_initialized():
        return ray, False
    try:
        _knock(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        where = f"The Ray cluster at {address}" if address else "Ray"
        advice = (
            "It needs the same versions of Ray and Python as this machine, and may ask for a token (RAY_AUTH_MODE)."
        )
        raise DataError(f"{where} cannot be used: {str(error).strip()}. {advice}") from error
    return ray, True


def _knock(address: str) -> None:
    """Raises OSError where nothing listens: Ray itself would try for minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


@contextlib.contextmanager
def _silenced(ray: Any) -> Iterator[None]:
    """Keep what Ray says about lost workers, which it has no setting for, off standard output: `--json` is there."""
    module = ray._private.worker
    before = getattr(module, "print_to_stdstream", None)
    if before is None:
        yield
        return
    module.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        module.print_to_stdstream = before


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo that Ray sets its own handler of SIGTERM when it connects."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
