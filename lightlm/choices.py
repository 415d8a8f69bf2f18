"""Names of devices, precisions and weights, checked without torch: a wrong one is reported before torch is imported."""

import re

from lightlm.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("ema", "raw")  # of a checkpoint with two sets: the average of the weights, and the last ones
QUANTIZATIONS = ("int8",)
_DEVICE = re.compile(r"auto|(cpu|mps)(:0)?|cuda(:\d+)?")


def check_device(name: str) -> None:
    """Raise UsageError unless this is `auto` or the name of a device, which this machine may lack."""
    if not _DEVICE.fullmatch(name):
        raise UsageError(f"unknown device '{name}'; use auto, cpu, cuda, cuda:N or mps")


def check_dtype(name: str) -> None:
    """Raise UsageError unless this is `auto` or the name of a precision."""
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"unknown dtype '{name}'; use auto, {', '.join(DTYPES)}")


def check_weights(name: str | None) -> None:
    """Raise UsageError unless this is None or names weights."""
    if name is not None and name not in WEIGHTS:
        raise UsageError(f"--weights {name}: use {' or '.join(WEIGHTS)}")


def check_quantize(name: str | None, dtype: str) -> None:
    """Raise UsageError unless this is None or a precision that weights are rounded to, with a `dtype` beside it."""
    if name is None:
        return
    if name not in QUANTIZATIONS:
        raise UsageError(f"--quantize {name}: use {' or '.join(QUANTIZATIONS)}")
    if dtype not in ("auto", "bfloat16"):
        raise UsageError(f"--quantize {name} computes in bfloat16; leave out --dtype {dtype}")
