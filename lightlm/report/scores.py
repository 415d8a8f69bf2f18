"""The runs' scores side by side, and pairwise comparisons of runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightlm.evaluate.compare.baselines import Baseline, Legend
from lightlm.evaluate.compare.comparison import Comparison, compare_all
from lightlm.report.record import Record, Score


@dataclass(frozen=True)
class Line:
    """One metric of one task, measured under one protocol.

    Args:
        documents: their number, and the parts of the protocol that a reader should see.
        scores: the score of each run's newest checkpoint that has this metric, by the run's number.
    """

    task: str
    metric: str
    documents: str
    scores: dict[int, Score] = field(default_factory=dict)

    def rank(self, runs: Iterable[int]) -> tuple[int, int]:
        """Return how many of these runs have the metric, and the number of documents."""
        return len(self.scores.keys() & set(runs)), max(score.row.documents or 0 for score in self.scores.values())

    def published(self, baseline: Baseline, legend: Legend) -> str:
        """Return the baseline's score as a cell, with its mark in the legend; a dash if there is none."""
        score = next(iter(self.scores.values()))
        figures = baseline.find(self.task, self.metric)
        return legend.cell(figures[0], score.answers.protocol.num_fewshot, score.limit) if figures else "–"


def score_lines(records: Sequence[Record]) -> list[Line]:
    """Return all scores; other documents or another number of examples in the prompt make another line."""
    lines: dict[tuple[str, str, str], Line] = {}
    for i, record in enumerate(records):
        for score in sorted(record.scores, key=lambda score: score.step or 0):
            key = (score.row.task, score.row.metric, _documents(score))
            lines.setdefault(key, Line(*key)).scores[i] = score
    return list(lines.values())


def widest(lines: Iterable[Line], runs: Iterable[int]) -> list[Line]:
    """For each task and metric, pick the line shared by the most of these runs; break ties by document count."""
    runs, found = set(runs), dict[tuple[str, str], Line]()
    for line in lines:
        other = found.setdefault((line.task, line.metric), line)
        if line.rank(runs) > other.rank(runs):
            found[line.task, line.metric] = line
    return [line for line in found.values() if line.rank(runs)[0]]


def compare_runs(records: Sequence[Record]) -> list[Comparison]:
    """Compare every run with the first, on the same documents where both have scores on them."""
    lines, found = score_lines(records), []
    for i in range(1, len(records)):
        shared = widest(lines, [0, i])
        answers = []
        for run in (0, i):
            own = {(line.task, line.metric): line for line in widest(lines, [run])}
            chosen = [line if run in line.scores else own.get((line.task, line.metric)) for line in shared]
            answers.append([line.scores[run].answers for line in chosen if line])
        found += compare_all(answers)
    return found


def _documents(score: Score) -> str:
    if score.row.documents is None:
        return ""
    shots = score.answers.protocol.num_fewshot
    return f"{score.row.documents:,}" + (" (cut)" if score.limit else "") + (f", {shots}-shot" if shots else "")
