"""Each document's part in a task's figures. With it two models are compared without scoring them again.

`<name>.documents.jsonl` has an object per task and document: `task`, `doc_id`, `doc_hash` (lm-eval's, of the document's
fields) and `metrics` by their names in tables. A metric that is a ratio of sums over documents, such as bits per byte,
has a pair (numerator, denominator): log-likelihood in nats and bytes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightlm import files
from lightlm.evaluate.results.rows import metric_name

Value = float | tuple[float, float]


@dataclass(frozen=True)
class Document:
    """A document of a task, with a model's figures on it."""

    task: str
    doc_id: int
    doc_hash: str
    metrics: dict[str, Value]


def of_samples(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Document]:
    """Convert lm-eval's samples by task, which have an entry per document and filter.

    Metrics that are neither a number nor a pair of numbers are left out.
    """
    found: dict[tuple[str, int], Document] = {}
    for task, entries in samples.items():
        for entry in entries:
            number = int(entry["doc_id"])
            document = found.setdefault((task, number), Document(task, number, str(entry["doc_hash"]), {}))
            values = {metric_name(metric, entry["filter"]): _value(entry[metric]) for metric in entry["metrics"]}
            document.metrics.update({name: value for name, value in values.items() if value is not None})
    return list(found.values())


def _value(value: Any) -> Value | None:
    """Convert a number or a pair of numbers, also of numpy and torch; None for other values."""
    parts = value if isinstance(value, list | tuple) else [value]
    try:
        numbers = tuple(float(part) for part in parts if not isinstance(part, str))
    except (TypeError, ValueError):
        return None
    if parts is not value and numbers:
        return numbers[0]
    return numbers if len(numbers) == len(parts) == 2 else None


def documents_file(results: Path) -> Path:
    """Return the path of the documents beside a results file."""
    return results.with_suffix(".documents.jsonl")


def write(path: Path, documents: Iterable[Document]) -> None:
    lines = (json.dumps(vars(document), separators=(",", ":")) for document in documents)
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def read(path: Path) -> list[Document]:
    """Read what `write` wrote; empty if there is no file, as beside the results of other tools.

    Raises:
        ValueError: the file has other content.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        lines = [json.loads(line) for line in text.splitlines()]
        for line in lines:
            line["metrics"] = {key: tuple(v) if isinstance(v, list) else v for key, v in line["metrics"].items()}
        return [Document(**line) for line in lines]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold scores of documents ({error!r})") from None
