"""When `torch.compile` pays."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from lightlm.errors import RecipeError
from lightlm.model.products import has_slow_mkl
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe

# On a CPU, compiling takes most of a minute and then saves an eighth of a step of `lightlm` (benchmarks/train.py
# --contestants "lightlm,lightlm compiled"). These are the FLOPs of 10 minutes at 0.8 TFLOP/s.
_CPU_FLOPS = 5e14
_TORCH = Path(torch.__file__).parent
_TRITON_CAPABILITY = (7, 0)  # the oldest GPUs, Volta's, that Triton generates code for


def compiles(
    recipe: Recipe,
    model: Transformer,
    device: torch.device,
    dtype: torch.dtype,
    note: Callable[[str], None] = lambda message: None,
) -> bool:
    """Return whether to compile: as the recipe says; for `auto`, on CUDA, and on a CPU in long runs.

    The answer depends on the recipe and the machine, not on a measurement, so that a run is repeatable. The run's
    recipe.yaml records it, since compiled and plain losses differ by rounding.

    Args:
        note: receives a message if CUDA lacks what compilation needs, so that `auto` does without.

    Raises:
        RecipeError: the recipe asks for compilation, and this machine lacks what it needs.
    """
    wanted = recipe.train.compile
    lacks = _lacks(device) if device.type == "cuda" and wanted is not False else ""
    if wanted is True and lacks:
        raise RecipeError(f"train.compile=true needs {lacks}, which this machine lacks; set train.compile=false")
    if wanted is True and device.type == "cpu" and not _can_link():
        raise RecipeError(
            f"train.compile=true needs torch in a folder without blanks in its path: torch.compile's linker stops at "
            f"them; it is in {_TORCH}. Move the virtual environment, or set train.compile=false"
        )
    if wanted is True and device.type == "cpu" and not _has_compiler():
        raise RecipeError(
            "train.compile=true needs a C++ compiler (g++ or clang++) and Python's headers, which this machine lacks; "
            "install them (on Debian: g++ and python3-dev), or set train.compile=false"
        )
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        if dtype == torch.float32 and has_slow_mkl():  # compiled blocks would take MKL's products
            return False
        long = model.flops_per_token(recipe.seq_len) * recipe.train.tokens >= _CPU_FLOPS
        return long and sys.platform == "linux" and _has_compiler() and _can_link()
    if lacks:
        note(f"training is not compiled, and slower for it: that needs {lacks}")
    return device.type == "cuda" and not lacks


def _lacks(device: torch.device) -> str:
    """Return what `torch.compile` misses on this machine's GPU, or an empty string."""
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return ""  # a plan for another machine
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < _TRITON_CAPABILITY:
        needed = ".".join(map(str, _TRITON_CAPABILITY))
        return f"a GPU of compute capability {needed} or later (this one has {found[0]}.{found[1]})"
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc", "cl")), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if compiler and headers.exists() else "a C compiler and Python's headers (on Debian: gcc and python3-dev)"


def _can_link() -> bool:
    """Return whether torch's libraries are where its C++ linker finds them."""
    return not any(map(str.isspace, str(_TORCH)))


def _has_compiler() -> bool:
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in ("g++", "clang++"))
