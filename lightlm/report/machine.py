"""What a run was trained on, kept in `machine.json` of its folder when it ends."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import lightlm
from lightlm import files
from lightlm.machine import lightlm_commit

_FILE = "machine.json"
_KEPT = ("device", "dtype", "micro_batch", "accumulation", "processes", "compile")


def record_machine(run: Path, facts: dict[str, Any]) -> None:
    """Write down the device, the versions, and what the trainer's facts say of batches and processes."""
    document = {key: facts[key] for key in _KEPT if key in facts} | {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightlm": lightlm.__version__,
        "commit": lightlm_commit(),
    }
    files.write_text(run / _FILE, json.dumps(document, indent=2) + "\n")


def read_machine(run: Path) -> dict[str, Any]:
    """What `record_machine` wrote, or nothing."""
    try:
        document = json.loads((run / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
