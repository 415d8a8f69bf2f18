"""The environment of a run or an evaluation: machine, versions and commits, for `machine.json` and `*.meta.json`."""

import contextlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lightlm
from lightlm import files
from lightlm.limits import memory

_RECORD = "machine.json"
_COMPUTER = ("processor", "cpu_features", "processors", "accelerator")
_TRAINING = ("device", "dtype", "micro_batch", "accumulation", "processes", "compile")
_GIB = 2**30
# Instructions by which libraries choose how to multiply matrices; processors of one name may differ in them.
_FEATURES = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "amx_fp16", "asimd", "asimdhp", "bf16", "i8mm", "sve", "svebf16",
)  # fmt: skip


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """Describe what a result depends on beside model, data and settings.

    Returns:
        `machine`: the computer and, if one is used, the accelerator; memory is in GiB.
        `versions`: of LightLM, Python, torch and `packages`; None for a package that is not installed.
        `commit` (of LightLM's checkout) and `working_directory_commit`: see `git_commit`.
    """
    checkout = Path(lightlm.__file__).parents[1]
    return {
        "machine": describe_machine(device),
        "versions": versions(*packages),
        "commit": git_commit(checkout) if (checkout / ".git").exists() else None,
        "working_directory_commit": git_commit(Path.cwd()),
    }


def record_machine(run: Path, device: torch.device, facts: dict[str, Any]) -> bool:
    """Write a run's `machine.json`: the environment, and what the trainer's facts say of batches and processes.

    It describes where the steps after `after_step` were trained. If a resumed run finds another environment than
    before, the list `earlier` keeps the old records, as far as they describe steps that the run still has.

    Returns:
        Whether the run's last steps were trained on a computer with another processor, number of cores or accelerator.
    """
    found, first = environment(device), facts.get("first_step", 0)
    document = {key: facts[key] for key in _TRAINING if key in facts} | found.pop("machine") | found.pop("versions")
    document |= found
    before = read_machine(run) if first else {}  # a run that starts over has no steps of earlier machines
    earlier = [*before.pop("earlier", []), *([before] if before else [])]
    earlier = [record for record in earlier if record.get("after_step", 0) < first]
    last = earlier[-1] if earlier else document
    if earlier and {key: value for key, value in last.items() if key != "after_step"} == document:
        first = earlier.pop().get("after_step", 0)
    document = {"after_step": first} | document | ({"earlier": earlier} if earlier else {})
    files.write_text(run / _RECORD, json.dumps(document, indent=2) + "\n")
    return any(last[key] != document[key] for key in _COMPUTER if key in last and key in document)


def read_machine(run: Path) -> dict[str, Any]:
    """Return a run's `machine.json`, which any version may have written, or nothing."""
    try:
        return dict(json.loads((run / _RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the `machine` part of `environment`."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": processor(),
        "cpu_features": cpu_features(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory() / _GIB, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"accelerator": properties.name, "accelerator_memory_gib": round(properties.total_memory / _GIB, 1)}
    return facts


def versions(*packages: str) -> dict[str, str | None]:
    """Return the `versions` part of `environment`."""
    own = {"lightlm": lightlm.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found: dict[str, str | None] = {**own}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_commit(folder: Path) -> str | None:
    """Return the commit of the repository that a folder lies in, or None outside a repository.

    A + follows the commit if tracked files differ from it.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def processor() -> str:
    """Return the CPU's model name where the system knows it, else its architecture."""
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


def cpu_features() -> str:
    """Return the CPU's instructions for matrix products, as in "avx2 fma".

    On Linux these are names of /proc/cpuinfo, elsewhere torch's level.
    """
    flags = cpu_flags().split()
    return " ".join(name for name in _FEATURES if name in flags) or torch.backends.cpu.get_cpu_capability().lower()


def cpu_flags() -> str:
    """Return all instructions of the CPU as Linux names them; elsewhere nothing."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "").strip()
    return ""
