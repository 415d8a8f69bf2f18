"""lm-eval's results as rows of a table."""

from dataclasses import dataclass
from typing import Any

ACCURACIES = ("acc", "exact_match")  # beginnings of the metrics that guessing among choices can reach


@dataclass(frozen=True)
class Row:
    """A task's figure for one metric. Args: documents: their number; None for a group of tasks."""

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int | None
    higher_is_better: bool | None


def metric_name(metric: str, filter_name: str) -> str:
    """Return a metric's name in tables, which includes a filter other than `none`."""
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def rows(results: dict[str, Any]) -> list[Row]:
    """Return every metric of every task and group in lm-eval's results."""
    found = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            error = float(stderr) if isinstance(stderr, (int, float)) else None
            count = results["n-samples"].get(task, {}).get("effective")
            higher_is_better = results["higher_is_better"].get(task, {}).get(metric)
            found.append(Row(task, metric_name(metric, filter_name), float(value), error, count, higher_is_better))
    return found
