"""Encoding blocks on a Ray cluster whose nodes share storage.

Only blocks and their descriptions travel; the node that runs a task reads the texts and writes the encoded block. An
encoded block is complete or absent (see `encoded_block.py`), so a task may die at any time and run again elsewhere,
even twice at once.
"""

import contextlib
import importlib.util
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightlm import __version__
from lightlm.data.prepare.blocks import Block, Job
from lightlm.data.prepare.encode import Report
from lightlm.data.prepare.encoded_block import EncodedBlock, block_path
from lightlm.data.prepare.executors import read_or_encode
from lightlm.errors import DataError, LightLMError, UsageError, how_to_install

RETRIES = 3  # of a block whose worker or node was lost; a block that kills every worker must fail
ARRIVAL_SECONDS = 10.0  # until a file of another node must be visible here: network file systems cache listings
CONNECT_SECONDS = 10.0
CANCEL_SECONDS = 5.0  # until canceled tasks that have not stopped are killed
SHARED = "With --engine ray the source and the folder to write (--out) must be on storage that has the same path on all"


class RayEngine:
    """Tasks of one CPU each, at most `tasks` at once (default: as many as the cluster has CPUs).

    Uses this process's connection to Ray if it has one. Otherwise connects to `address`; without an address, to
    RAY_ADDRESS or a Ray on this machine. Starts a Ray here, for the duration of the work, if there is none.
    """

    def __init__(self, tasks: int | None = None, address: str | None = None) -> None:
        """Raises UsageError where Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise UsageError(f"--engine ray needs Ray, which is not installed; {how_to_install('ray')}")
        self._tasks, self._address = tasks, address

    def __call__(self, job: Job, blocks: Iterator[Block], report: Report) -> Generator[EncodedBlock, None, None]:
        with _connected(self._address) as ray:
            most = self._tasks or max(1, int(ray.cluster_resources().get("CPU", 1)))
            task = ray.remote(num_cpus=1, max_retries=RETRIES)(encode_here)
            shared = ray.put(job)  # sent once for all blocks
            waiting: deque[Any] = deque()  # in the order of the blocks
            running: list[Any] = []
            try:
                while True:
                    # As many again may be finished and wait for an earlier one whose worker was lost.
                    while len(running) < most and len(waiting) < 2 * most and (block := next(blocks, None)):
                        waiting.append(task.remote(shared, block, __version__))
                        running.append(waiting[-1])
                    if not waiting:
                        return
                    if running:
                        _, running = ray.wait(running, timeout=None if waiting[0] in running else 0)
                    if waiting[0] not in running:
                        encoded = _result(ray, waiting.popleft())
                        _expect_files(job.folder, encoded)
                        report(encoded.documents, sum(encoded.text_bytes.values()), encoded.total_tokens)
                        yield encoded
            finally:
                _cancel(ray, running)


def encode_here(job: Job, block: Block, version: str) -> EncodedBlock:
    """Encode a block in a Ray worker."""
    # `tokenizers` would otherwise use every core of the node in each of its tasks.
    os.environ["RAYON_NUM_THREADS"] = "1"
    if __version__ != version:
        raise DataError(
            f"The Ray node {platform.node()} has LightLM {__version__}, and this machine {version}; install the same "
            "version on both."
        )
    # Without this check --skip-bad would leave out a source that is missing on this node.
    for path in (job.tokenizer, *_files(block.units[0].texts)):
        if not path.exists():
            raise DataError(f"The Ray node {platform.node()} has no {path}. {SHARED} nodes.")
    return read_or_encode(job, block)


def _files(stream: object) -> Iterator[Path]:
    """Yield the local files that a reader was made with."""
    if isinstance(stream, Path):
        yield stream
    elif isinstance(stream, partial):
        for part in (stream.func, *stream.args, *stream.keywords.values()):
            yield from _files(part)


def _result(ray: Any, reference: Any) -> EncodedBlock:
    """Return a task's result. Raises the task's error as a local one."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (LightLMError, OSError)) and not isinstance(error.cause, ConnectionError):
            raise error.cause from None
        _, missing, module = str(error).rpartition("No module named ")
        if not missing:
            raise
        module = module.split()[0].strip("'\".;")
        raise DataError(
            f"A Ray worker has no Python module {module}. Every node needs the same packages as this machine: there, "
            f"in the Python of Ray, {how_to_install('ray')}"
        ) from error
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise DataError(
            f"Ray lost a task {RETRIES + 1} times, or the cluster ({type(error).__name__}: {' '.join(lines[:2])})."
        ) from error


def _expect_files(folder: Path, encoded: EncodedBlock) -> None:
    """Wait until this machine sees the files that a task wrote. Raises DataError after `ARRIVAL_SECONDS`."""
    paths = [block_path(folder, encoded.number, kind) for kind in ("json", *encoded.xxh3)]
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while absent := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise DataError(
                f"A Ray task wrote {absent[0]}, which is not on this machine. {SHARED} nodes and this machine."
            )
        time.sleep(0.1)


def _cancel(ray: Any, running: list[Any]) -> None:
    """Stop tasks by an exception, on which they delete their temporary files; kill those that take too long."""
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
    """Give the `ray` module with a connection to a cluster. Raises DataError where it cannot connect."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # LightLM sends nothing that the user has not asked for
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it prints a warning about GPUs
    import ray

    if ray.is_initialized():
        yield ray
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        host, colon, port = (address or os.environ.get("RAY_ADDRESS", "")).rpartition("://")[2].rpartition(":")
        if colon and port.isdecimal():  # where nothing listens, Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        where = f"The Ray cluster at {address}" if address else "Ray"
        advice = "It needs the versions of Ray and Python of this machine, and may require a token (RAY_AUTH_MODE)."
        raise DataError(f"{where} cannot be used: {str(error).strip()}. {advice}") from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:  # Ray replaces the handler in the main thread
            signal.signal(signal.SIGTERM, before)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints about lost workers on standard output, as --json does
            yield ray
    finally:
        ray.shutdown()
