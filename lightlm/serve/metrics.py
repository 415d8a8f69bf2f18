"""Counters and gauges of a server, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Metric:
    """A name, its kind (counter, gauge or summary), what it means, and the names of its labels."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("lightlm_requests_total", "counter", "Answered requests by path and status.", ("path", "status")),
    Metric("lightlm_choices_total", "counter", "Ended choices by reason.", ("reason",)),
    Metric("lightlm_prompt_tokens_total", "counter", "Tokens of the prompts, once per choice."),
    Metric("lightlm_generated_tokens_total", "counter", "Tokens generated."),
    Metric("lightlm_rows", "gauge", "Rows of the batch, the most choices decoded at a time."),
    Metric("lightlm_rows_used", "gauge", "Choices being decoded."),
    Metric("lightlm_rows_waiting", "gauge", "Choices waiting for a row."),
    Metric("lightlm_queue_seconds", "summary", "Time that a choice waited for a row."),
    Metric("lightlm_first_token_seconds", "summary", "Time from a request to the first token of each choice."),
    Metric("lightlm_choice_seconds", "summary", "Time from a request to the end of each choice."),
    Metric("lightlm_step_seconds", "summary", "Time of a decoding step, one token for each row."),
)


class Metrics:
    """The values of `METRICS`. Any thread may change or write them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name = {metric.name: metric for metric in METRICS}
        self._values: dict[str, dict[tuple[str, ...], list[float]]] = {metric.name: {} for metric in METRICS}
        self._gauges: dict[str, Callable[[], float]] = {}
        for metric in METRICS:  # a counter without labels exists before its first event
            if metric.kind != "gauge" and not metric.labels:
                self._values[metric.name][()] = [0.0, 0.0]

    def add(self, name: str, amount: float = 1, *labels: str) -> None:
        """Add to a counter, or to a summary one observation."""
        metric = self._by_name[name]
        assert len(labels) == len(metric.labels), name
        with self._lock:
            value = self._values[name].setdefault(labels, [0.0, 0.0])
            value[0] += amount
            value[1] += 1

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """Let `read` give a gauge's value when the metrics are written."""
        self._gauges[self._by_name[name].name] = read

    def write(self) -> str:
        """Return all metrics as Prometheus reads them."""
        lines = []
        with self._lock:
            values = {name: {key: tuple(value) for key, value in rows.items()} for name, rows in self._values.items()}
        for name, read in self._gauges.items():
            values[name] = {(): (read(), 1)}
        for metric in METRICS:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
            for key, (total, count) in sorted(values[metric.name].items()):
                names = ",".join(f'{n}="{_escaped(v)}"' for n, v in zip(metric.labels, key, strict=True))
                labels = f"{{{names}}}" if names else ""
                if metric.kind == "summary":
                    lines += [f"{metric.name}_sum{labels} {total:.9g}", f"{metric.name}_count{labels} {count:.17g}"]
                else:
                    lines.append(f"{metric.name}{labels} {total:.17g}")
        return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
