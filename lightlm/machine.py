"""What something ran on: processor, memory, versions and commits, for `machine.json` of a run and files of results."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lightlm

GIB = 2**30


def processor() -> str:
    """The CPU's model name where the system tells it, else its architecture."""
    try:
        if sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, StopIteration, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """The machine's memory, or None where it cannot be found out."""
    try:
        if sys.platform == "win32":
            import psutil

            return int(psutil.virtual_memory().total)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, ImportError):
        return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine, and the accelerator if one is used. Memory is in GiB."""
    memory = memory_bytes()
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory / GIB, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"accelerator": properties.name, "accelerator_memory_gib": round(properties.total_memory / GIB, 1)}
    return facts


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of LightLM, Python, torch and further packages; None for one that is not installed."""
    found: dict[str, str | None] = {
        "lightlm": lightlm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def lightlm_commit() -> str | None:
    """The commit of the checkout that LightLM runs from, with a + if files differ from it; None if it is installed."""
    root = Path(lightlm.__file__).parents[1]
    return git_commit(root) if (root / ".git").exists() else None


def git_commit(folder: Path) -> str | None:
    """The commit of the repository that a folder lies in, with a + if files differ from it; None where there is none.

    A file that git does not track makes no difference.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
