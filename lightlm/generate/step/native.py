"""Compiles `native.c` where there is a C compiler, and keeps the result.

The forward pass of a few tokens then takes the time of reading the weights. Without a compiler, torch's operations
compute the same in more time. `LIGHTLM_NATIVE=0` in the environment chooses them too.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lightlm.files import cache_folder
from lightlm.machine import processor

_SOURCE = Path(__file__).with_name("native.c")
_COMPILERS = ("cc", "gcc", "clang")
# Sums may be computed in any order, but NaN and infinities are kept.
_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
)
# In turn, until one works: of the processor that runs, then of any. Apple's compiler takes OpenMP as an option of its
# front end only, and older ones of Arm's do not know -march=native.
_OPENMP = ("-Xclang", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
_PROCESSORS: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
# First without a library of OpenMP: its functions are those of torch, whose threads do the work. LLVM's and GNU's
# differ, so a compiler of the other kind links its own.
_LINKING = (("-undefined", "dynamic_lookup"),) if sys.platform == "darwin" else ((), _OPENMP)
_SECONDS = 60  # for one attempt


class Matrix(ctypes.Structure):
    """A matrix as native.c reads it; the tensors belong to the caller."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


class Op(ctypes.Structure):
    """An operation; native.c says what each kind reads."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "mode", "wait", "layer", "window", "routed", "add")),
        ("matrices", ctypes.POINTER(Matrix)),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "frequencies", "input", "output")),
        *((name, ctypes.c_float) for name in ("factor", "eps")),
    )


class Call(ctypes.Structure):
    """What changes from call to call, and the shape of the model."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "width", "heads", "groups", "size", "gated")),
        *((name, ctypes.c_int64) for name in ("experts", "choices", "threads")),
        *((name, ctypes.c_void_p) for name in ("ids", "rows", "positions", "cache")),
        *((name, ctypes.c_int64) for name in ("cache_type", "layer_step", "row_step", "pair_step", "group_step")),
        ("own", ctypes.c_void_p),
        ("own_step", ctypes.c_int64),
        ("widest", ctypes.c_int64),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None where they cannot be had. The first call of a machine takes a second."""
    if os.environ.get("LIGHTLM_NATIVE", "1") == "0" or os.name == "nt":
        return None
    command = shlex.split(os.environ.get("CC", "")) or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not command:
        return None
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        facts = [_SOURCE.read_text(encoding="utf-8"), command, _FLAGS, _machine(), torch.__version__]
        name = f"native-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.so"
        kept = cache_folder() / name
        with contextlib.suppress(OSError):  # there is none yet, or it is damaged
            return _load(kept)
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(dir=cache_folder(), prefix="native-")
        except (OSError, RuntimeError):
            folder = tempfile.mkdtemp(prefix="lightlm-native-")
        try:
            built = _build(command, Path(folder))
            if built is not None:
                with contextlib.suppress(OSError, RuntimeError):
                    os.replace(built[1], kept)
                return built[0]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _build(command: list[str], folder: Path) -> tuple[ctypes.CDLL, Path] | None:
    """Return the library and its file, compiled with the first options that work."""
    for options in _PROCESSORS:
        target = folder / "native.o"
        if not _runs([*command, *_FLAGS, *_OPENMP, *options, "-c", str(_SOURCE), "-o", str(target)]):
            continue
        for number, linking in enumerate(_LINKING):
            shared = folder / f"native{number}.so"
            if _runs([*command, "-shared", str(target), *linking, "-lm", "-o", str(shared)]):
                with contextlib.suppress(OSError):  # a function is missing
                    return _load(shared), shared
    return None


def _runs(command: list[str]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.run.argtypes = (ctypes.POINTER(Op), ctypes.c_int64, ctypes.POINTER(Call))
    loaded.run.restype = None
    return loaded


def _machine() -> str:
    """Return what the compiled code depends on: a home folder may be shared between machines."""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{processor()} {flags}"
