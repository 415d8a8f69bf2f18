"""Steps that have become much slower than they were: why, and what to do.

Steps are judged in blocks, by the block's median, so a few slow steps do not count: those that compile, or those beside
the writing of a checkpoint. A block is compared with the fastest block before it that has the same batch size, and two
slow blocks in a row are an episode.
Validation and saving are not part of a step's time.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

_STEPS, _SECONDS = 5, 10.0  # a block's least steps and least time
_SLOW, _NORMAL = 2.0, 1.3  # times the fastest block: a block is slow, is normal again
_EPISODE = 2  # slow blocks in a row
_MUCH_WAITING = 0.3  # share of a step that waits for data
_MUCH_SWAPPING = 100.0  # pages per second that had to be read from disk
_MUCH_TAKEN = 0.25  # cores that others use; an idle desktop stays below
_MUCH_STOLEN = 0.1  # share of the cores' time that the host of a virtual machine gives to others


@dataclass(frozen=True)
class Counters:
    """What has been counted since the machine, or this process, started; None where the system does not say."""

    seconds: float  # wall time
    cores: int  # that this process may use
    own: float  # CPU seconds of this process
    busy: float | None = None  # CPU seconds of all processes on these cores
    stolen: float | None = None  # CPU seconds that a virtual machine's host gave to others
    page_ins: int | None = None  # pages of this process that had to be read from disk
    load: float | None = None  # processes that run or wait, a mean over a minute


def read_counters() -> Counters:
    """Read the counters in about a tenth of a millisecond."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    found: dict[str, Any] = {}
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError):  # a sandbox may hide the file
            lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
            wanted, ticks = {f"cpu{core}" for core in cores}, os.sysconf("SC_CLK_TCK")
            # user, nice, system, idle, iowait, irq, softirq, steal, ...
            rows = [[int(n) / ticks for n in row[1:9]] for row in map(str.split, lines) if row and row[0] in wanted]
            if rows:
                found["busy"] = sum(sum(row[:3]) + sum(row[5:7]) for row in rows)
                found["stolen"] = sum(sum(row[7:]) for row in rows)
    if sys.platform == "win32":
        import psutil

        times = psutil.cpu_times()
        found["busy"] = times.user + times.system
    else:
        import resource

        found["page_ins"] = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        with contextlib.suppress(OSError):
            found["load"] = os.getloadavg()[0]
    return Counters(time.monotonic(), len(cores), time.process_time(), **found)


class SlowSteps:
    """Notices when steps become much slower.

    Args:
        device: where the model trains.
        processes: of this run on this machine; each is taken to use as much CPU time as this one.
        read: returns the present counters.
    """

    def __init__(self, device: torch.device, processes: int = 1, read: Callable[[], Counters] = read_counters) -> None:
        self._device, self._processes, self._read = device, processes, read
        self._batch_tokens, self._fastest, self._slow = 0, math.inf, 0  # slow blocks in a row
        self._steps: list[tuple[float, float]] = []  # seconds and seconds of waiting, of this block
        self._total, self._before = 0.0, read()

    def judge(self, metrics: dict[str, Any]) -> str:
        """Take a step's metrics; return a note when an episode of slow steps begins, otherwise an empty text."""
        if metrics["batch_tokens"] != self._batch_tokens:
            self._batch_tokens, self._fastest, self._slow = metrics["batch_tokens"], math.inf, 0
            self._begin_block()
        self._steps.append((metrics["step_seconds"], metrics["data_seconds"]))
        self._total += metrics["step_seconds"]
        if len(self._steps) < _STEPS or self._total < _SECONDS:
            return ""
        seconds, fastest = median(seconds for seconds, _ in self._steps), self._fastest
        least = _SLOW if self._slow < _EPISODE else _NORMAL
        self._slow = self._slow + 1 if seconds >= least * fastest else 0
        self._fastest = min(fastest, seconds)
        note = ""
        if self._slow == _EPISODE:
            note = (
                f"steps take {seconds / fastest:.1f} times as long as before ({_short(seconds)}, "
                f"were {_short(fastest)}): {self._cause(self._read())}"
            )
        self._begin_block()
        return note

    def _begin_block(self) -> None:
        self._steps, self._total, self._before = [], 0.0, self._read()

    def _cause(self, now: Counters) -> str:
        """Return the most likely cause during this block, and what to do about it."""
        before, cores = self._before, now.cores
        wall = max(now.seconds - before.seconds, 1e-9)

        def rate(name: str) -> float:
            first, last = getattr(before, name), getattr(now, name)
            return 0.0 if first is None or last is None else (last - first) / wall

        waiting = sum(waited for _, waited in self._steps) / self._total
        if waiting >= _MUCH_WAITING:
            return (
                f"they wait for data {waiting:.0%} of the time; the disk that holds the data is slow, or another "
                "process uses it"
            )
        if rate("page_ins") >= _MUCH_SWAPPING:
            return "memory is full and the system swaps; stop other processes, or lower train.micro_batch_size"
        load = "" if now.load is None else f"load {now.load:.1f}"
        if now.busy is not None:
            taken = rate("busy") - self._processes * rate("own")
            others = f"other processes use {taken:.1f} of {_cores(cores)}" + (f" ({load})" if load else "")
        else:
            taken = 0.0 if now.load is None else now.load - cores
            others = f"other processes use the CPU ({load} on {_cores(cores)})"
        if taken >= _MUCH_TAKEN:
            threads = max(1, cores - math.ceil(taken))
            advice = "stop them"
            if self._device.type == "cpu" and self._processes == 1:
                advice += f"; or press Ctrl-C, and resume with OMP_NUM_THREADS={threads} lightlm train --resume"
            return f"{others}; {advice}"
        if rate("stolen") >= _MUCH_STOLEN * cores:
            return "the host of this virtual machine gives its CPU time to others; another machine may be faster"
        if self._device.type == "cuda":
            return "look at nvidia-smi for other processes on the GPU, its temperature and its power limit"
        return "no other process uses the CPU; check whether the machine is hot, saves power or runs on battery"


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _cores(count: int) -> str:
    return f"{count} cores" if count > 1 else "1 core"
