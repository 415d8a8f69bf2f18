"""metrics.jsonl: one object per step, and the file. docs/metrics.md defines each metric."""

import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from lightlm import files
from lightlm.runs.metrics import METRICS, read_metrics

# Metrics that differ between two runs of the same recipe.
MEASURED = frozenset({"seconds", "step_seconds", "data_seconds", "tokens_per_second", "mfu", "memory", "resumed"})


class MetricsFile(contextlib.AbstractContextManager["MetricsFile"]):
    """`metrics.jsonl` of a run, open for appending.

    `logged_step` is the last step that the file held before it was cut, 0 for none. `last` is the row of the last step
    that it was opened with, empty for none.
    """

    def __init__(self, run: Path, last_step: int) -> None:
        """Open the file and drop steps after `last_step`, which an interrupted run logged but did not save."""
        steps = read_metrics(run)
        self.logged_step = steps[-1]["step"] if steps else 0
        kept = [metrics for metrics in steps if metrics["step"] <= last_step and last_step]  # a start validates anew
        self.last: dict[str, Any] = kept[-1] if kept else {}
        files.write_text(run / METRICS, "".join(json.dumps(metrics) + "\n" for metrics in kept))
        self._path = run / METRICS
        self._file = self._path.open("a", encoding="utf-8")
        self._resumes = last_step > 0

    def write(self, metrics: dict[str, Any]) -> None:
        """Append the metrics of a step. The first step after a resume also gets `resumed`."""
        if self._resumes:
            metrics, self._resumes = metrics | {"resumed": True}, False
        # JSON has no NaN or infinity: the loss of a skipped step may be null.
        values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        with files.writing(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def __exit__(self, *error: object) -> None:
        with files.writing(self._path), self._file:
            os.fsync(self._file.fileno())


def peak_memory(device: torch.device) -> int | None:
    """Return the peak of bytes in use so far: of tensors on a CUDA device, of the whole process on a CPU.

    MPS keeps no peak: its driver's present allocation. None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    # On Linux, ru_maxrss includes the peak of the process that forked this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    if kilobytes := re.search(r"^VmHWM:\s*(\d+)", status, re.MULTILINE):
        return int(kilobytes[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
