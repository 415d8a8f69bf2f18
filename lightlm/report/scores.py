"""The runs' scores in tasks: which stand beside each other, and what can be said of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from lightlm.evaluate.compare.comparison import Answers, Comparison, compare_all
from lightlm.evaluate.results import documents
from lightlm.report.record import Record, Score


@dataclass(frozen=True)
class Line:
    """One figure under one protocol.

    Args:
        documents: how many, and what of the protocol the reader should see.
        scores: by the run's number, of its newest checkpoint with this figure.
    """

    task: str
    metric: str
    documents: str
    scores: dict[int, Score] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return max(score.row.documents or 0 for score in self.scores.values())


class Scores:
    """All figures of these runs; on other documents or with other examples in the prompt they are separate lines."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._files: dict[Path, dict[str, list[documents.Document]]] = {}
        lines: dict[tuple[str, str, str], Line] = {}
        for i, record in enumerate(records):
            for score in sorted(record.scores, key=lambda score: score.step or 0):
                key = (score.row.task, score.row.metric, _documents(score))
                lines.setdefault(key, Line(*key)).scores[i] = score
        self.lines = list(lines.values())

    def widest(self, runs: Sequence[int]) -> list[Line]:
        """Of each task and metric the line that most of these runs have, of such the one with most documents."""
        found: dict[tuple[str, str], Line] = {}
        for line in self.lines:
            rank = (len(line.scores.keys() & set(runs)), line.count)
            other = found.get((line.task, line.metric))
            if rank[0] and (other is None or rank > (len(other.scores.keys() & set(runs)), other.count)):
                found[line.task, line.metric] = line
        return list(found.values())

    def comparisons(self) -> list[Comparison]:
        """Every run against the first, on the same documents where both have figures on such."""
        found = []
        for i in range(1, len(self._records)):
            first, second = (
                [
                    self._answers(run, (line if run in line.scores else own).scores[run])
                    for line in self.widest([0, i])
                    for own in self.widest([run])
                    if (own.task, own.metric) == (line.task, line.metric)
                ]
                for run in (0, i)
            )
            found += compare_all([first, second])
        return found

    def _answers(self, run: int, score: Score) -> Answers:
        shares = {
            document.doc_id: (document.doc_hash, document.metrics[score.row.metric])
            for document in self._read(score.file).get(score.row.task, ())
            if score.row.metric in document.metrics
        }
        return Answers(self._records[run].name, score.row, score.protocol, shares)

    def _read(self, results: Path) -> dict[str, list[documents.Document]]:
        """The documents beside a results file by task; none if they cannot be read."""
        if results not in self._files:
            try:
                found = documents.read(documents.documents_file(results))
            except (OSError, ValueError):
                found = []
            self._files[results] = {task: list(group) for task, group in groupby(found, lambda one: one.task)}
        return self._files[results]


def _documents(score: Score) -> str:
    if score.row.documents is None:
        return ""
    shots = score.protocol.num_fewshot
    return f"{score.row.documents:,}" + (" (cut)" if score.limit else "") + (f", {shots}-shot" if shots else "")
