"""Reading metrics.jsonl, of which each line is the JSON object of one step. docs/metrics.md defines each metric."""

import json
import mmap
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of all steps of a run so far."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill can leave half a line


def last_metrics(run: Path) -> tuple[dict[str, Any], float | None]:
    """Return the last whole line of a run's metrics and the last validation loss, without reading the whole file.

    Raises:
        OSError, ValueError, KeyError: the file cannot be read.
    """
    path = run / METRICS
    if not path.is_file() or not path.stat().st_size:
        return {}, None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n")  # a kill can leave half a line after it
        if end < 0:
            return {}, None
        validated = content.rfind(b'"val_loss":', 0, end)
        val_loss = _line(content, validated)["val_loss"] if validated >= 0 else None
        return _line(content, end), val_loss


def _line(content: mmap.mmap, position: int) -> dict[str, Any]:
    """Return the object in the line around or before a position."""
    end = content.find(b"\n", position)
    start = content.rfind(b"\n", 0, position) + 1
    values = json.loads(content[start:end])
    if not isinstance(values, dict):
        raise ValueError("a line is not a JSON object")
    return values
