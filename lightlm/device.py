"""Devices and precisions: what a machine has, and what the data sheets of accelerators say."""

import contextlib
import ctypes
import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightlm import choices, cpu
from lightlm.errors import UsageError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in choices.DTYPES}
_SLOW = 1.5  # products that take this many times as long as in fp32 are worth a note


@dataclass(frozen=True)
class Accelerator:
    """Figures of a vendor's data sheet."""

    peak: float  # dense bf16 FLOP/s, without sparsity
    memory: float  # bytes, of the smallest variant
    bandwidth: float  # bytes per second between chip and memory, of the smallest variant


# By words in the device's name.
ACCELERATORS = {
    "H200": Accelerator(989e12, 141e9, 4.8e12),
    "H100 PCIe": Accelerator(756e12, 80e9, 2e12),
    "H100": Accelerator(989e12, 80e9, 3.35e12),
    "A100": Accelerator(312e12, 40e9, 1.555e12),
    "L40S": Accelerator(362e12, 48e9, 864e9),
    "L40": Accelerator(181e12, 48e9, 864e9),
    "L4": Accelerator(121e12, 24e9, 300e9),
    "A10": Accelerator(125e12, 24e9, 600e9),
    "RTX 4090": Accelerator(165e12, 24e9, 1008e9),
    "RTX 3090": Accelerator(71e12, 24e9, 936e9),
}


def pick_device(name: str = "auto") -> torch.device:
    """Return the named device; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        UsageError: there is no such device, this machine lacks it, or this torch has no code for it.
    """
    if name == "auto":
        if torch.cuda.is_available() and has_code_for(torch.device("cuda")):  # else torch warns
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    choices.check_device(name)
    device = torch.device(name)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        offered = ", ".join(kind for kind, there in available.items() if there)
        raise UsageError(f"device '{name}' is not available; this machine has {offered}")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UsageError(f"device '{name}' is not available; this machine has cuda:0 to cuda:{count - 1}")
    if device.type == "cuda" and not has_code_for(device):
        number = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise UsageError(
            f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)} (compute capability "
            f"{number}; it has {' '.join(torch.cuda.get_arch_list())}); install torch for another version of CUDA "
            "(docs/install.md), or use the device cpu"
        )
    if device.type == "cuda" and device.index is not None:
        # Streams, generators and memory that name no GPU are then this one's.
        torch.cuda.set_device(device)
    return device


def has_code_for(device: torch.device) -> bool:
    """Return whether this torch has code for a CUDA device.

    torch for CUDA 13 has none for GPUs before Turing, and still calls them available.
    """
    built = re.findall(r"\b(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    if not built:  # ROCm has other names
        return True
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code (sm) runs on later minor versions; `compute`, which the driver compiles, on all later ones.
    return any(
        (int(first), int(second)) <= (major, minor) and (kind == "compute" or int(first) == major)
        for kind, first, second in built
    )


def release_memory(device: torch.device) -> None:
    """Return memory that torch keeps for reuse to an accelerator."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def has_fast_bf16(device_type: str, width: int = cpu.WIDTH) -> bool:
    """Return whether bf16 products are fast: on CUDA from Ampere, on a CPU by measurement (`cpu.gain`)."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return device_type == "cpu" and cpu.has_fast_bf16(width)


def pick_dtype(
    name: str, device: torch.device, width: int = cpu.WIDTH, note: Callable[[str], None] | None = None
) -> torch.dtype:
    """Return the compute precision; `auto` is bfloat16 where it is fast, else float32.

    On a CPU, the first call measures for some milliseconds, and the process keeps the answer.

    Args:
        width: the model's hidden size, which is that of the measured products.
        note: receives that a named precision is slow here, as "NAME: ..."; None skips that measurement.

    Raises:
        UsageError: the precision is unknown.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device.type, width) else torch.float32
    choices.check_dtype(name)
    dtype = DTYPES[name]
    if note is not None and dtype != torch.float32:
        if device.type == "cpu" and (times := 1 / cpu.gain(dtype, width)) >= _SLOW:
            note(
                f"{name}: products take {times:.1f} times as long as in float32 on this CPU; float32 or auto is faster"
            )
        elif device.type == "cuda" and dtype == torch.bfloat16 and not has_fast_bf16("cuda"):
            note(f"{name}: this GPU emulates it; auto takes a precision that it computes in")
    return dtype


def training_dtype(
    name: str, device: torch.device, width: int = cpu.WIDTH, note: Callable[[str], None] | None = None
) -> torch.dtype:
    """Return the precision of training, as `pick_dtype`.

    On CUDA before Ampere bf16 is emulated, so that `auto` is float16 where there are units for it (Volta, Turing).
    """
    if name == "auto" and device.type == "cuda" and (7, 0) <= torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return pick_dtype(name, device, width, note)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context manager for mixed precision; it does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep freed memory for reuse, if its C library is glibc.

    glibc returns freed blocks above 32 MB to the system at once, and the next such block costs a page fault per page:
    filling a new (50257, 576) fp32 tensor takes 41 ms on a Xeon core, and 17 ms in kept memory
    (benchmarks/allocation.py). The process does not grow beyond its peak.
    """
    if sys.platform != "linux":
        return
    # From malloc.h: sizes above which memory is returned to the system, and is mapped outside the heap.
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        libc = ctypes.CDLL(None)
        for option in (m_mmap_threshold, m_trim_threshold):
            libc.mallopt(option, 2**31 - 1)


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 peak of a known accelerator in FLOP/s, or None (CPUs differ too much to list)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: "RTX A1000" is not an A100, "L40" is not an L4. These variants, and parts of a GPU (MIG), have peaks
    # of their own.
    other = re.compile(r"\b(Laptop|D|Ti|Super|NVL|MIG)\b", re.IGNORECASE)
    found = (gpu.peak for part, gpu in ACCELERATORS.items() if re.search(rf"\b{part}\b", name))
    return None if other.search(name) else next(found, None)


def describe(device: torch.device) -> str:
    """Return a description of the device for logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu ({threads} {'thread' if threads == 1 else 'threads'})" if device.type == "cpu" else device.type
