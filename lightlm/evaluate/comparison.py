"""Whether one model is better than another at a task, beyond the noise of which documents the task happens to have.

It is not the noise of training: another seed gives another model, and only runs with several seeds tell of that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lightlm.evaluate import paired
from lightlm.evaluate.documents import Document, Value
from lightlm.evaluate.figures import Row, rows
from lightlm.evaluate.paired import Difference

# Of metrics that say the same of a document, the one that is compared.
_SAME_FIGURES = {"byte_perplexity": "bits_per_byte", "word_perplexity": "bits_per_byte"}


@dataclass(frozen=True)
class Protocol:
    """How a task was put to a model.

    Args:
        version, num_fewshot: without which two figures are not of the same task.
        dtype, bos: which change the answers a little.
    """

    version: Any = None
    num_fewshot: Any = None
    dtype: str | None = None
    bos: Any = None

    def refusal(self, other: "Protocol") -> str | None:
        """Why figures under these two protocols must not be compared."""
        if self.version != other.version:
            return f"task versions {self.version} and {other.version}"
        if self.num_fewshot != other.num_fewshot:
            return f"{self.num_fewshot} and {other.num_fewshot} examples in the prompt"
        return None

    def notes(self, other: "Protocol") -> list[str]:
        """What else differs, where both say what it was."""
        pairs = [("", self.dtype, other.dtype), ("BOS ", self.bos, other.bos)]
        return [f"{what}{a} against {b}" for what, a, b in pairs if None not in (a, b) and a != b]


@dataclass(frozen=True)
class Answers:
    """A model's figure on a task, and its share in it of each document: hash and value by number."""

    model: str
    row: Row
    protocol: Protocol
    documents: Mapping[int, tuple[str, Value]]


@dataclass(frozen=True)
class Comparison:
    """Two models' figures for one task and metric.

    Args:
        higher_is_better: None where that has no answer.
        documents: that both were scored on.
        difference: second less first; None where it cannot be told, for the `reason`.
        share: the figure is a share of documents, which is written in percentage points.
        notes: differences of protocol that do not forbid it.
    """

    task: str
    metric: str
    first: str
    second: str
    higher_is_better: bool | None
    documents: int
    difference: Difference | None = None
    reason: str = ""
    share: bool = False
    notes: Sequence[str] = ()

    @property
    def winner(self) -> int | None:
        """0 if the first model is better beyond noise, 1 if the second is."""
        if self.difference is None or self.higher_is_better is None or not self.difference.beyond_noise:
            return None
        return int((self.difference.value > 0) == self.higher_is_better)

    def sentence(self) -> str:
        """For people: which is better and by how much, or that it cannot be told."""
        where = f"at {self.task} {self.metric}"
        if self.difference is None:
            return f"{self.second} and {self.first} are not compared {where}: {self.reason}"
        amount, interval = self._lead(self.difference)
        facts = ", ".join(
            [f"95% interval {interval}", _p_text(self.difference.p_value), f"{self.documents:,} documents", *self.notes]
        )
        if self.winner is None:
            ahead = f"{self.second} {'' if amount.startswith('-') else '+'}{amount}"
            return f"{self.second} and {self.first}: no difference beyond noise {where} ({ahead}, {facts})"
        better, worse = (self.second, self.first) if self.winner else (self.first, self.second)
        return f"{better} is better than {worse} {where} by {amount} ({facts})"

    def _lead(self, difference: Difference) -> tuple[str, str]:
        """How far the better model, or where there is none the second, is ahead, and between what bounds."""
        sign = -1 if (self.higher_is_better is False) != (self.winner == 0) else 1
        scale, digits = (100, 1) if self.share else (1, 4)
        unit = " points" if self.share else " bits a byte" if self.metric == "bits_per_byte" else ""
        low, high = sorted((sign * difference.low, sign * difference.high))
        amount, low_text, high_text = (
            f"{scale * number:.{digits}f}" for number in (sign * difference.value, low, high)
        )
        return amount + unit, f"{low_text} to {high_text}"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        about = {key: getattr(self, key) for key in ("task", "metric", "first", "second", "documents")}
        about["notes"] = list(self.notes)
        if self.difference is None:
            return about | {"refused": self.reason}
        return about | {
            "difference": self.difference.value,
            "interval_95": [self.difference.low, self.difference.high],
            "p_value": self.difference.p_value,
            "method": self.difference.method,
            "beyond_noise": self.difference.beyond_noise,
            "better": None if self.winner is None else (self.first, self.second)[self.winner],
        }


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def answers_of(
    model: str, results: Mapping[str, Any], documents: Sequence[Document], facts: Mapping[str, Any]
) -> list[Answers]:
    """Every figure of a results document, with the documents' shares where they are known.

    Args:
        results: lm-eval's document.
        documents: beside it, see `lightlm.evaluate.documents`.
        facts: of the `.meta.json` beside it.
    """
    by_task = {task: list(group) for task, group in groupby(documents, lambda document: document.task)}
    dtype = facts.get("dtype") or (results.get("config") or {}).get("model_dtype")
    found = []
    for row in rows(dict(results)):
        protocol = Protocol(
            results.get("versions", {}).get(row.task),
            results.get("n-shot", {}).get(row.task),
            str(dtype).removeprefix("torch.") if dtype else None,
            facts.get("bos"),
        )
        shares = {
            document.doc_id: (document.doc_hash, document.metrics[row.metric])
            for document in by_task.get(row.task, ())
            if row.metric in document.metrics
        }
        found.append(Answers(model, row, protocol, shares))
    return found


def compare(first: Answers, second: Answers) -> Comparison:
    """Compare two models' figures for the same task and metric."""
    row = first.row
    about = (row.task, row.metric, first.model, second.model, row.higher_is_better)
    if refusal := first.protocol.refusal(second.protocol):
        return Comparison(*about, 0, reason=refusal)
    for answers in (first, second):
        if not answers.documents:
            return Comparison(*about, 0, reason=f"there are no scores by document of {answers.model}; score it again")
    if {i: document[0] for i, document in first.documents.items()} != {
        i: document[0] for i, document in second.documents.items()
    }:
        counts = f"{len(first.documents):,} and {len(second.documents):,}"
        return Comparison(*about, 0, reason=f"they were scored on different documents ({counts})")
    numbers = sorted(first.documents)
    (x_N, w_N), (y_N, v_N) = (_columns([answers.documents[i][1] for i in numbers]) for answers in (first, second))
    form = paired.form_of(x_N, w_N, row.value)
    if form is None or not np.array_equal(w_N, v_N) or paired.form_of(y_N, v_N, second.row.value) is not form:
        return Comparison(*about, len(numbers), reason="the figure is no mean over documents")
    share = bool((w_N == 1).all() and min(x_N.min(), y_N.min()) >= 0 and max(x_N.max(), y_N.max()) <= 1)
    notes = tuple(first.protocol.notes(second.protocol))
    return Comparison(*about, len(numbers), paired.difference(x_N, y_N, w_N, form), share=share, notes=notes)


def _columns(values: Sequence[Value]) -> tuple[paired.Floats, paired.Floats]:
    """Numerators and denominators (N,)."""
    pairs = [value if isinstance(value, tuple) else (value, 1.0) for value in values]
    columns = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return columns[0], columns[1]


def compare_all(models: Sequence[Sequence[Answers]]) -> list[Comparison]:
    """Each model against the first, for every figure that both have; groups of tasks are left to their tasks."""
    found = []
    for second in models[1:]:
        others = {(answers.row.task, answers.row.metric): answers for answers in second}
        metrics = {(answers.row.task, answers.row.metric) for answers in models[0]}
        for answers in models[0]:
            task, metric = answers.row.task, answers.row.metric
            if (task, _SAME_FIGURES.get(metric)) in metrics or answers.row.documents is None:
                continue
            if (other := others.get((task, metric))) is not None:
                found.append(compare(answers, other))
    return found


def best(answers: Sequence[Answers]) -> int | None:
    """Which of several models is better than every other one beyond noise, for one task and metric."""
    higher = answers[0].row.higher_is_better
    if len(answers) < 2 or higher is None:
        return None
    values = [one.row.value for one in answers]
    leader = values.index(max(values) if higher else min(values))
    others = (compare(answers[leader], other) for i, other in enumerate(answers) if i != leader)
    return leader if all(comparison.winner == 0 for comparison in others) else None
