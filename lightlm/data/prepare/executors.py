"""Running blocks: an engine encodes them wherever it likes, and hands their records over in order."""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from lightlm.data.prepare.blocks import Block, Job
from lightlm.data.prepare.encode import Report, encode_block
from lightlm.data.prepare.encoded_block import Record, read_record

AHEAD = 8  # blocks that are done or under way beyond one for each worker: a second of forcing shards to the disk


class Engine(Protocol):
    """Gives the record of every block in the order of the blocks; a piece that is there already is not made again.

    `report` may be called from any thread. Takes few blocks ahead of those it has given: each is a piece on the disk.
    It is closed when no more records are wanted, and then stops what is under way before it returns.
    """

    def __call__(self, job: Job, blocks: Iterator[Block], report: Report) -> Generator[Record, None, None]: ...


class ThreadEngine:
    """Threads of this process: reading, encoding and writing are Arrow's, gigatoken's and the system's work, which
    Python's lock does not stop.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def __call__(self, job: Job, blocks: Iterator[Block], report: Report) -> Generator[Record, None, None]:
        stop = threading.Event()

        def report_or_stop(documents: int, text_bytes: int, tokens: int) -> None:
            if stop.is_set():
                raise InterruptedError
            report(documents, text_bytes, tokens)

        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="encode")
        running: deque[Future[Record]] = deque()
        try:
            for block in blocks:
                running.append(pool.submit(done_or_encoded, job, block, report_or_stop))
                if len(running) >= self._workers + AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def done_or_encoded(job: Job, block: Block, report: Report | None = None) -> Record:
    """The record of a block's piece, which is made unless it is there."""
    record = read_record(job.folder, block.number)
    if record is not None and (record.first_unit, record.limit, record.only) == (
        block.units[0].id,
        block.limit,
        block.only,
    ):
        if report is not None:
            report(record.documents, sum(record.text_bytes.values()), record.total_tokens)
        return record
    return encode_block(job, block, report)
