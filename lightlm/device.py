"""Which device and precision a machine offers."""

import contextlib
import ctypes
import functools
import re
import sys
from dataclasses import dataclass

import torch

from lightlm.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Accelerator:
    """What a vendor's data sheet says."""

    peak: float  # dense bf16 FLOP/s, without sparsity
    memory: float  # bytes; of the smallest, where there are several


# By a part of the device's name.
ACCELERATORS = {
    "H200": Accelerator(989e12, 141e9),
    "H100 PCIe": Accelerator(756e12, 80e9),
    "H100": Accelerator(989e12, 80e9),
    "A100": Accelerator(312e12, 40e9),
    "L40S": Accelerator(362e12, 48e9),
    "L40": Accelerator(181e12, 48e9),
    "L4": Accelerator(121e12, 24e9),
    "A10": Accelerator(125e12, 24e9),
    "RTX 4090": Accelerator(165e12, 24e9),
    "RTX 3090": Accelerator(71e12, 24e9),
}


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, else MPS, else CPU; or the device named.

    Raises:
        UsageError: torch does not know the device, or this machine lacks it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}'; use auto, cpu, cuda, cuda:N or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        offered = ", ".join(kind for kind, there in available.items() if there)
        raise UsageError(f"device '{name}' is not available here; this machine offers {offered}")
    return device


@functools.cache
def has_fast_bf16(device_type: str) -> bool:
    """Whether bf16 matrix products run on the device's own units: CUDA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device_type == "cpu":
        # Private probes: a torch that lacks one is taken to lack the unit.
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute precision: `auto` is bfloat16 where it is fast, else float32.

    Raises:
        UsageError: no such precision.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device.type) else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown dtype '{name}'; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for `dtype`, or a context that does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, where the C library can be told to (glibc).

    glibc gives blocks above 32 MB back to the system at once, and the next such block is paid for page by page: filling
    a new (50257, 576) fp32 tensor took 41 ms on a Xeon core, and 17 ms in kept memory (benchmarks/allocation.py). What
    is kept was in use before, so the process does not grow past its peak.
    """
    if sys.platform != "linux":
        return
    # From malloc.h: the sizes from which memory is mapped, and given back, apart from the heap.
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        libc = ctypes.CDLL(None)
        for option in (m_mmap_threshold, m_trim_threshold):
            libc.mallopt(option, 2**31 - 1)


def peak_flops(device: torch.device) -> float | None:
    """The bf16 peak of a known accelerator in FLOP/s, or None (CPUs differ too much to list)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: "RTX A1000" is no A100, "L40" no L4.
    return next((gpu.peak for part, gpu in ACCELERATORS.items() if re.search(rf"\b{part}\b", name)), None)


def describe(device: torch.device) -> str:
    """The device in words, for logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
