"""The figures of one training step, as they stand in metrics.jsonl; docs/metrics.md says what each means."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

# What two runs of the same recipe need not have in common, unlike all other keys.
MEASURED = frozenset({"seconds", "step_seconds", "data_seconds", "tokens_per_second", "mfu", "memory"})


def step_metrics(
    *,
    step: int,
    tokens: int,
    seconds: float,
    batch_tokens: int,
    loss: float,
    rates: dict[str, float],
    grad_norm: float,
    step_seconds: float,
    data_seconds: float,
    memory: int | None,
    utilisation_per_token: float | None,
) -> dict[str, Any]:
    """One object of metrics.jsonl.

    Args:
        step, tokens, seconds: counts after the step, over the whole run.
        rates: learning rates by their keys (`optimizers.learning_rates`).
        utilisation_per_token: FLOPs a token over the device's peak FLOP/s; None where the peak is not known.
    """
    metrics: dict[str, Any] = {
        "step": step,
        "tokens": tokens,
        "loss": loss,
        **rates,
        "batch_tokens": batch_tokens,
        "grad_norm": grad_norm,
        "tokens_per_second": batch_tokens / step_seconds,
        "seconds": seconds,
        "step_seconds": step_seconds,
        "data_seconds": data_seconds,
    }
    if memory is not None:
        metrics["memory"] = memory
    if utilisation_per_token is not None:
        metrics["mfu"] = utilisation_per_token * metrics["tokens_per_second"]
    return metrics


def peak_memory(device: torch.device) -> int | None:
    """Bytes in use at the highest point so far: tensors on a CUDA device, the whole process on a CPU.

    On MPS, which keeps no peak, what the driver holds now. None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # Not ru_maxrss, where this is known: it begins at what the process that started this one held at its own peak.
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
