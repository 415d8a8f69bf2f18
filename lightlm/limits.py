"""What a container, a batch system or the machine lets this process use. Imports nothing heavy.

Linux sets limits by control groups: version 2 in one tree, version 1 in a tree per resource. A group's limit holds for
the groups below it, so the tightest one on the way to the root counts.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """Return the processor cores that this process may use, rounded up where its time on them is limited."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = []
    for folder in _groups("cpu"):
        if line := _read(folder / "cpu.max").split():  # version 2: "max 100000", or microseconds per period
            quota, period = line[0], line[-1]
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # version 1 writes -1 for none
            shares.append(int(quota) / int(period))
    return max(1, min([own, *map(math.ceil, shares)]))


def memory() -> int:
    """Return the bytes of memory that this process may use if no other process uses any."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().total)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _groups("memory"):
        limits = (_read(folder / name) for name in ("memory.max", "memory.limit_in_bytes"))
        found += [int(limit) for limit in limits if limit.isdigit()]  # without one: "max", or a number near 2**63
    return min(found)


def _groups(resource: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups for a resource, from its own up to the root."""
    for line in _read(_OWN_GROUPS).splitlines():
        _, names, place = line.split(":", 2)  # 0::/path in version 2, 4:cpu,cpuacct:/path in version 1
        if not names or resource in names.split(","):
            root = _GROUPS if not names else _GROUPS / (names if (_GROUPS / names).is_dir() else resource)
            folder = root / place.lstrip("/")
            while folder != root:
                yield folder
                folder = folder.parent
            yield root


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip()
    return ""
