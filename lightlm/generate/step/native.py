"""Compiles `native.c` where there is a C compiler, and keeps the result.

The forward pass of a few tokens then takes the time of reading the weights. Without a compiler, torch's operations
compute the same in more time. `LIGHTLM_NATIVE=0` in the environment chooses them too, and `LIGHTLM_NATIVE=1` tries to
compile on macOS, where nobody has run this.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lightlm.files import cache_folder
from lightlm.machine import cpu_flags, processor

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
_SECONDS = 60  # for one run of the compiler, which is then taken to hang
_DIGEST_SIZE = hashlib.sha256().digest_size
_PROCESS = os.getpid()


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
    default = "1" if sys.platform.startswith("linux") else "0"
    if os.name == "nt" or (os.environ.get("LIGHTLM_NATIVE") or default) == "0":
        return None
    # RuntimeError: there is no home folder. ValueError: CC has a quote without an end.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        command = shlex.split(os.environ.get("CC", "")) or [name for name in _COMPILERS if shutil.which(name)][:1]
        if not command:
            return None
        facts = [_SOURCE.read_text(encoding="utf-8"), command, _FLAGS, _machine(), torch.__version__]
        name = f"native-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.so"
        return _kept(cache_folder() / name) or _compiled(command, cache_folder(), name) or _compiled(command)
    return None


def num_threads() -> int:
    """Return how many threads compute: torch's number.

    It is 1 in a forked process: GNU's OpenMP would wait forever for threads that a fork does not copy.
    """
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def _kept(path: Path) -> ctypes.CDLL | None:
    """Return a library from an earlier call, or None if there is none or it is damaged.

    Its file ends with a digest: loading a part of a library, as a full disk or a power cut leaves it, ends the process.
    """
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content[:-_DIGEST_SIZE]).digest() == content[-_DIGEST_SIZE:]:
            return _load(path)
    return None


def _compiled(command: list[str], keep: Path | None = None, name: str = "") -> ctypes.CDLL | None:
    """Compile in a folder and keep the result under a name there; without one, in a temporary folder.

    None if nothing works there: a folder may be read-only, or forbid to execute what lies in it.
    """
    try:
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=keep, prefix="lightlm-native-"))
    except OSError:
        return None
    try:
        built = _build(command, folder)
        if built is not None and keep is not None:
            with contextlib.suppress(OSError):
                digest = hashlib.sha256(built[1].read_bytes()).digest()
                with built[1].open("ab") as file:
                    file.write(digest)
                os.replace(built[1], keep / name)
        return built[0] if built is not None else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    """Run a compiler; raise TimeoutError if it hangs. What it has started ends with it."""
    try:
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except (OSError, subprocess.SubprocessError):
        return False
    try:
        return process.wait(_SECONDS) == 0
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} hangs") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.run.argtypes = (ctypes.POINTER(Op), ctypes.c_int64, ctypes.POINTER(Call))
    loaded.run.restype = ctypes.c_int
    return loaded


def _machine() -> str:
    """Return what the compiled code depends on: a home folder may be shared between machines."""
    return f"{processor()} {cpu_flags()}"
