"""Engines: they encode blocks, and yield the encoded blocks in order."""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from lightlm.data.prepare.blocks import Block, Job
from lightlm.data.prepare.encode import Report, encode_block
from lightlm.data.prepare.encoded_block import EncodedBlock, read_encoded_block

AHEAD = 8  # blocks finished or running beyond one per worker: they cover a second of forcing shards to the disk


class Engine(Protocol):
    """Yields every block encoded, in the order of the blocks; blocks that are on disk are not encoded again.

    May call `report` from any thread. Takes only a few blocks ahead of those it has yielded, since each takes disk
    space. Closing it stops running work before it returns.
    """

    def __call__(self, job: Job, blocks: Iterator[Block], report: Report) -> Generator[EncodedBlock, None, None]: ...


class ThreadEngine:
    """Threads of this process. Arrow, gigatoken and the system do the work outside Python's global lock."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def __call__(self, job: Job, blocks: Iterator[Block], report: Report) -> Generator[EncodedBlock, None, None]:
        stop = threading.Event()

        def report_or_stop(documents: int, text_bytes: int, tokens: int) -> None:
            if stop.is_set():
                raise InterruptedError
            report(documents, text_bytes, tokens)

        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="encode")
        running: deque[Future[EncodedBlock]] = deque()
        try:
            for block in blocks:
                running.append(pool.submit(read_or_encode, job, block, report_or_stop))
                if len(running) >= self._workers + AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def read_or_encode(job: Job, block: Block, report: Report | None = None) -> EncodedBlock:
    """Return an encoded block from the disk; encode it if it is absent or was encoded up to another limit."""
    encoded = read_encoded_block(job.folder, block.number)
    if encoded is None or (encoded.first_unit, encoded.limit) != (block.units[0].id, block.limit):
        return encode_block(job, block, report)
    if report is not None:
        report(encoded.documents, sum(encoded.text_bytes.values()), encoded.total_tokens)
    return encoded
