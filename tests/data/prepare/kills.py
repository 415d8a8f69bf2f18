"""`prepare-data` processes that die by SIGKILL until the folder is complete.

Three kinds of death: at a random moment; just before a random operation on a file (opening to write, renaming,
deleting, making a folder), in whichever thread; and just before one of those that put the finished folder in place.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightlm.data.prepare import assembly, blocks
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import jsonl as readers
from lightlm.data.readers import texts

SHARD_TOKENS = 20_000
MOMENT, OPERATION, PLACING = "moment", "operation", "placing"


def small_sizes() -> None:
    """Sizes that give a source of a megabyte some fifty blocks and a dozen saved states."""
    blocks.BLOCK_BYTES = readers.BLOCK_BYTES = 20_000
    for module in (texts, readers):
        module.CHUNK_BYTES = 5_000  # type: ignore[attr-defined]
    assembly.SAVE_TOKENS = 20_000


def run(source: Path, tokenizer: str, out: Path, overwrite: bool = False) -> None:
    """One complete preparation with small sizes."""
    small_sizes()
    prepare(
        str(source),
        tokenizer,
        out,
        shard_tokens=SHARD_TOKENS,
        workers=2,
        encoder="gigatoken",
        val_fraction=0.02,
        overwrite=overwrite,
    )


def _die_at(kind: str, number: int, report: Path) -> None:
    """SIGKILL this process just before its `number`-th operation of a kind, and say in `report` which that was."""
    count, lock = 0, threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if not _counts(kind, event, arguments):
            return
        with lock:
            count += 1
            if count == number:
                report.write_text(f"{event} {Path(str(arguments[0])).name}")
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _counts(kind: str, event: str, arguments: tuple[Any, ...]) -> bool:
    path = str(arguments[0]) if arguments else ""
    if event == "open":
        writes = isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return kind == OPERATION and writes and ".partial" in path
    if event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"):
        return False
    return kind == OPERATION or (kind == PLACING and "/blocks/" not in path and "/blocks/" not in str(arguments[-1]))


def _process(source: Path, tokenizer: str, out: Path, overwrite: bool, kind: str, number: int, report: Path) -> None:
    if kind != MOMENT and number:
        _die_at(kind, number, report)
    run(source, tokenizer, out, overwrite)


@dataclass
class Harness:
    """Starts and kills processes that prepare `source` into folders beside each other."""

    source: Path
    tokenizer: str
    seed: int
    landed: list[str] = field(default_factory=list)  # what each kill hit

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lightlm.data.prepare.run", "gigatoken", "awkward", "tokenizers"])
        self._seconds = 1.0  # of an uninterrupted preparation

    def complete(self, out: Path, kills: int, *, overwrite: bool = False) -> None:
        """Run the same command until the folder is complete, killing up to `kills` of its processes."""
        for life in range(kills + 1):
            kind = self._random.choice([MOMENT, OPERATION, PLACING]) if life < kills else MOMENT
            number = 0 if life == kills else self._random.randrange(1, 30 if kind == PLACING else 250)
            if self._live(out, overwrite, kind, number, doomed=life < kills):
                return
        raise AssertionError(f"{out} did not complete")

    def _live(self, out: Path, overwrite: bool, kind: str, number: int, *, doomed: bool) -> bool:
        """One process; whether it came to its end."""
        report = out.with_name("report")
        report.write_text("a moment")
        arguments = (self.source, self.tokenizer, out, overwrite, kind, number, report)
        process = self._context.Process(target=_process, args=arguments)
        began = time.perf_counter()
        process.start()
        if doomed and kind == MOMENT:
            process.join(self._random.uniform(0, 1.2 * self._seconds))
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            self.landed.append(f"{report.read_text()}; left {self._left(out)}")
            return False
        assert process.exitcode == 0, process.exitcode
        if not doomed:
            self._seconds = max(self._seconds, time.perf_counter() - began)
        return True

    @staticmethod
    def _left(out: Path) -> str:
        partial = out.with_name(f".{out.name}.partial")
        encoded = len(list((partial / "work" / "blocks").glob("*.json")))
        shards = len(list((partial / "folder").glob("*.bin")))
        return f"{encoded} blocks, {shards} shards{', the folder' if out.exists() else ''}"
