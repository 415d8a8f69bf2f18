"""lm-eval's results as rows of a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FOLDED = 10  # tasks in a group, above which tables show only the group

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


def leaf_tasks(results: Mapping[str, Any], group: str) -> list[str]:
    """Return the tasks of a group and of the groups in it; none for a task."""
    children = results.get("group_subtasks", {}).get(group, ())
    return [task for child in children for task in (leaf_tasks(results, child) or [child])]


def folded_tasks(results: Mapping[str, Any]) -> set[str]:
    """Return the tasks of large groups with figures of their own, such as BLiMP's 67: tables show the group."""
    members = {group: leaf_tasks(results, group) for group in results.get("groups", ())}
    return {task for tasks in members.values() if len(tasks) > _FOLDED for task in tasks}


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
            # lm-eval does not say it of groups of groups.
            named = (results["higher_is_better"].get(name, {}) for name in (task, *leaf_tasks(results, task)))
            higher_is_better = next((known[metric] for known in named if metric in known), None)
            found.append(Row(task, metric_name(metric, filter_name), float(value), error, count, higher_is_better))
    return found
