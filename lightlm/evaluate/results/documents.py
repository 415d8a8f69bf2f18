"""What every document contributed to a task's figures, kept beside lm-eval's results: two models can then be compared
document by document, without scoring them again. Imports nothing heavy.

`<name>.documents.jsonl` has one object a task and document: `task`, `doc_id`, `doc_hash` (lm-eval's, of the document's
fields) and `metrics`, by the names that tables have. A figure that is a ratio of sums over documents, such as bits per
byte, has the pair (numerator, denominator): here the log-likelihood in nats and the bytes.
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
    """One document of a task, with a model's figures on it."""

    task: str
    doc_id: int
    doc_hash: str
    metrics: dict[str, Value]


def of_samples(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Document]:
    """From lm-eval's samples of each task, where a document stands once for each of the task's filters.

    Metrics that are neither a number nor a pair of numbers for a document are left out.
    """
    found: dict[tuple[str, int], Document] = {}
    for task, entries in samples.items():
        for entry in entries:
            empty = Document(task, int(entry["doc_id"]), str(entry["doc_hash"]), {})
            document = found.setdefault((task, empty.doc_id), empty)
            for metric in entry["metrics"]:
                if (value := _value(entry[metric])) is not None:
                    document.metrics[metric_name(metric, entry["filter"])] = value
    return list(found.values())


def _value(value: Any) -> Value | None:
    if isinstance(value, list | tuple):
        numbers = [_number(item) for item in value]
        return (numbers[0], numbers[1]) if len(numbers) == 2 and None not in numbers else None  # type: ignore[return-value]
    return _number(value)


def _number(value: Any) -> float | None:
    """Also of numpy's and torch's scalars."""
    if isinstance(value, str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def documents_file(results: Path) -> Path:
    """The documents of a results file."""
    return results.with_suffix(".documents.jsonl")


def write(path: Path, documents: Iterable[Document]) -> None:
    lines = (
        {
            "task": document.task,
            "doc_id": document.doc_id,
            "doc_hash": document.doc_hash,
            "metrics": {name: _short(value) for name, value in document.metrics.items()},
        }
        for document in documents
    )
    files.write_text(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def _short(value: Value) -> Any:
    """1 rather than 1.0: most figures are right or wrong."""
    if isinstance(value, tuple):
        return [_short(item) for item in value]
    return int(value) if value.is_integer() else value


def read(path: Path) -> list[Document]:
    """What `write` wrote; nothing if the file is not there, as beside results of other tools.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        return [_document(json.loads(line)) for line in text.splitlines() if line]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold scores of documents ({error!r})") from None


def _document(line: dict[str, Any]) -> Document:
    metrics = {name: value for name, stored in line["metrics"].items() if (value := _value(stored)) is not None}
    return Document(line["task"], line["doc_id"], line["doc_hash"], metrics)
