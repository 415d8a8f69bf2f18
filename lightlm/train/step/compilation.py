"""When `torch.compile` pays."""

import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from lightlm.errors import RecipeError
from lightlm.model.fused import has_slow_mkl
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe

# On a CPU, compiling takes most of a minute and then saves an eighth of a step of `lightlm` (benchmarks/train.py
# --contestants "lightlm,lightlm compiled"). These are the FLOPs of 10 minutes at 0.8 TFLOP/s.
_CPU_FLOPS = 5e14


def compiles(recipe: Recipe, model: Transformer, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether to compile: as the recipe says; for `auto`, on CUDA, and on a CPU in long runs.

    The answer depends on the recipe and the machine, not on a measurement, so that a run is repeatable. The run's
    recipe.yaml records it, since compiled and plain losses differ by rounding.

    Raises:
        RecipeError: the recipe asks for compilation, and this machine has no C++ compiler.
    """
    wanted = recipe.train.compile
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
        return long and sys.platform == "linux" and _has_compiler()
    return device.type == "cuda"


def _has_compiler() -> bool:
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in ("g++", "clang++"))
