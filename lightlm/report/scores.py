"""The runs' scores side by side, and pairwise comparisons of runs."""

from collections.abc import Iterable, Sequence

from lightlm.evaluate.compare.comparison import Comparison, adjust, compare_pair
from lightlm.evaluate.compare.table import Line, Score, count_documents
from lightlm.evaluate.compare.table import score_lines as lines_of
from lightlm.report.record import Record


def score_lines(records: Sequence[Record]) -> list[Line]:
    """Return all scores; other documents, prompts or chosen settings make another line.

    Each line has the score of each run's newest checkpoint that has this metric.
    """

    def describe(score: Score) -> str:
        protocol, shots = score.answers.protocol, score.answers.protocol.num_fewshot
        if not (count := count_documents(score)):
            return protocol.chosen
        facts = [f"{shots}-shot" if shots else "", protocol.chat, protocol.chosen]
        return ", ".join(filter(None, [f"{count}{' (cut)' if score.limit else ''}", *facts]))

    return lines_of([sorted(record.scores, key=lambda score: score.step or 0) for record in records], describe)


def widest(lines: Iterable[Line], runs: Iterable[int]) -> list[Line]:
    """For each task and metric, pick the line shared by the most of these runs.

    Of several, the one with the most documents counts, then one with default settings.
    """
    runs, found = set(runs), dict[tuple[str, str], Line]()

    def rank(line: Line) -> tuple[int, int, bool]:
        documents = max(score.row.documents or 0 for score in line.scores.values())
        default = not any(score.answers.protocol.chosen for score in line.scores.values())
        return len(line.scores.keys() & runs), documents, default

    for line in lines:
        other = found.setdefault((line.task, line.metric), line)
        if rank(line) > rank(other):
            found[line.task, line.metric] = line
    return [line for line in found.values() if rank(line)[0]]


def compare_runs(records: Sequence[Record]) -> list[Comparison]:
    """Compare every run with the first, on the same documents where both have scores on them."""
    lines, found = score_lines(records), list[Comparison]()
    for i in range(1, len(records)):
        shared = widest(lines, [0, i])
        answers = []
        for run in (0, i):
            own = {(line.task, line.metric): line for line in widest(lines, [run])}
            chosen = [line if run in line.scores else own.get((line.task, line.metric)) for line in shared]
            answers.append([line.scores[run].answers for line in chosen if line])
        found += compare_pair(*answers)
    return adjust(found)
