"""Names of devices and precisions, checked without torch: a wrong one is reported before torch is imported."""

import re

from lightlm.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")
_DEVICE = re.compile(r"auto|(cpu|mps)(:0)?|cuda(:\d+)?")


def check_device(name: str) -> None:
    """Raise UsageError unless this is `auto` or the name of a device, which this machine may lack."""
    if not _DEVICE.fullmatch(name):
        raise UsageError(f"unknown device '{name}'; use auto, cpu, cuda, cuda:N or mps")


def check_dtype(name: str) -> None:
    """Raise UsageError unless this is `auto` or the name of a precision."""
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"unknown dtype '{name}'; use auto, {', '.join(DTYPES)}")
