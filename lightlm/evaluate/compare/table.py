"""The table of scores as data. The CLI renders it with rich, the report as HTML."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lightlm.evaluate.compare.baselines import Baseline, Legend
from lightlm.evaluate.compare.chance import chance_of
from lightlm.evaluate.compare.comparison import NOISE, Answers, Comparison, sentences
from lightlm.evaluate.results.board import BOARD
from lightlm.evaluate.results.rows import ACCURACIES, Row

TEXT_COLUMNS = 2  # task and metric; the others hold numbers
ARROWS = {True: " ↑", False: " ↓", None: ""}  # by `higher_is_better`, as lm-eval draws them
ARROW_NOTE = "↑ higher is better, ↓ lower is better."

# The meaning of metrics, by the beginning of their names; the longest that fits counts.
MEANINGS = {
    "bits_per_byte": "bits that the model needs for a byte of text",
    "byte_perplexity": "2 to the power of bits_per_byte",
    "word_perplexity": "e to the power of the loss per word",
    "perplexity": "e to the power of the loss per answer",
    "acc": "share of documents whose right answer is the most likely one",
    "acc_norm": "acc with each answer's likelihood divided by its characters",
    "acc_tokens": "acc with each answer's likelihood divided by its tokens",
    "acc_ties": "acc with a tie counted as half",
    "index": "the Open SLM Leaderboard's; 0 is guessing, 100 is perfect",
    "part_index": "the index without ArithMark-3, which the leaderboard does not have",
    "acc_bytes": "acc with each answer's likelihood divided by its bytes",
    "acc_mutual_info": "acc with each answer's likelihood divided by that without the question",
    "exact_match": "share of documents answered word for word",
}


@dataclass(frozen=True)
class Score:
    """One metric of one task, measured on a model.

    Args:
        step: the checkpoint's step; None if it is not shown or unknown.
        limit: the number of documents that the task was limited to; None for all.
    """

    step: int | None
    limit: int | None
    answers: Answers

    @property
    def row(self) -> Row:
        """The value, its standard error and its number of documents."""
        return self.answers.row

    def __str__(self) -> str:
        digits = 2 if self.row.task == BOARD else 4  # points, or shares
        error = "" if self.row.stderr is None else f" ± {self.row.stderr:.{digits}f}"
        return f"{self.row.value:.{digits}f}{error}{'' if self.step is None else f' (step {self.step:,})'}"


@dataclass(frozen=True)
class Line:
    """One metric of one task on the same documents. Args: scores: by the model's number, if it has one."""

    task: str
    metric: str
    documents: str
    scores: dict[int, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of models and published figures.

    Args:
        columns: task, metric and documents, then one per model and baseline.
        rows: texts by column.
        best: (row, column) of figures that are better beyond noise.
        sentences: the comparisons in words.
        notes: what noise means, cut prompts, the meaning of metrics, and the legend of published figures.
        figures_from: the first column with figures of a model.
    """

    columns: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    sentences: list[str]
    notes: list[str]
    figures_from: int


def count_documents(score: Score) -> str:
    """Return the number of documents as text; empty for a group of tasks."""
    return "" if score.row.documents is None else f"{score.row.documents:,}"


def score_lines(models: Sequence[Sequence[Score]], describe: Callable[[Score], str] = count_documents) -> list[Line]:
    """Return a line per task, metric and description of its documents; of equal scores of a model the last counts.

    The tasks of large groups are left out in favor of the group.
    """
    lines: dict[tuple[str, str, str], Line] = {}
    for number, scores in enumerate(models):
        for score in (score for score in scores if not score.answers.folded):
            key = (score.row.task, score.row.metric, describe(score))
            lines.setdefault(key, Line(*key)).scores[number] = score
    return list(lines.values())


def score_table(
    lines: Sequence[Line],
    models: Sequence[str],
    comparisons: Sequence[Comparison] = (),
    baselines: Sequence[Baseline] = (),
) -> ScoreTable:
    """Build the table. With two models, a figure that is better beyond noise is marked as best."""
    figures = list(models) if len(models) > 1 else ["Value ± Stderr"]
    chances = [_chance(line) for line in lines]
    with_chance = any(chances)
    pairs = {(one.task, one.metric): one for one in comparisons} if len(models) == 2 else {}
    legend = Legend()
    rows: list[list[str]] = []
    best = set()
    for line, chance in zip(lines, chances, strict=True):
        pair = pairs.get((line.task, line.metric))
        if pair is not None and pair.winner is not None and _shows(line, pair):
            best.add((len(rows), TEXT_COLUMNS + 1 + with_chance + pair.winner))
        score = next(iter(line.scores.values()))
        protocol = score.answers.protocol
        published = [baseline.find(line.task, line.metric) for baseline in baselines]
        cells = [str(line.scores.get(number, "")) for number in range(len(models))]
        cells += [legend.cell(found[0], protocol, score.limit) if found else "–" for found in published]
        metric = line.metric + ARROWS[score.row.higher_is_better]
        rows.append([line.task, metric, line.documents, *([chance] if with_chance else []), *cells])
    columns = ["Task", "Metric", "Documents", *(["Chance"] if with_chance else []), *figures]
    columns += [f"{one.name}\n{one.tokens} tokens" if one.tokens else one.name for one in baselines]
    notes = [NOISE] if any(comparison.difference for comparison in comparisons) else []
    notes += [*_truncations(lines, models), *_meanings(lines), *unmatched(baselines, lines)]
    return ScoreTable(
        columns, rows, best, sentences(comparisons), notes + legend.lines(baselines), TEXT_COLUMNS + 1 + with_chance
    )


def _shows(line: Line, pair: Comparison) -> bool:
    """Whether a line has the figures that were compared; a report has further ones of other documents."""
    scores = (line.scores.get(number) for number in range(2))
    return all(score and score.answers is one for score, one in zip(scores, pair.figures, strict=True))


def _chance(line: Line) -> str:
    """Return the accuracy that guessing reaches, by the known tasks or by the number of choices; empty if unknown."""
    if not line.metric.startswith(ACCURACIES):
        return ""
    known = chance_of(line.task)
    chance = known.value if known else next(iter(line.scores.values())).answers.chance
    return "" if chance is None else f"{chance:.4f}"


def _truncations(lines: Iterable[Line], models: Sequence[str]) -> list[str]:
    """Return a sentence per model and task whose requests were cut."""
    found: dict[str, None] = {}
    for line in lines:
        for number, score in line.scores.items():
            if score.answers.truncation.cut:
                who = f"{models[number]}: " if len(models) > 1 else ""
                shots = score.answers.protocol.num_fewshot
                found.setdefault(who + score.answers.truncation.sentence(line.task, shots))
    return [f"{sentence}." for sentence in found]


def _meanings(lines: Iterable[Line]) -> list[str]:
    """Return what the metrics of these lines mean, and which way is better."""
    metrics = dict.fromkeys(line.metric.partition(" ")[0] for line in lines)
    known = [f"{metric}: {MEANINGS[metric]}" for metric in metrics if metric in MEANINGS]
    return [" ".join([ARROW_NOTE, *(f"{text}." for text in known)])] if metrics else []


def unmatched(baselines: Sequence[Baseline], lines: Sequence[Line]) -> list[str]:
    """Return a sentence per baseline that has no published figure for any of these lines."""
    found = []
    for baseline in baselines:
        if not any(baseline.find(line.task, line.metric) for line in lines):
            known = (f"{one.task} ({one.metric})" if one.task == BOARD else one.task for one in baseline.figures)
            listed = ", ".join(dict.fromkeys(known))
            found.append(f"{baseline.name} has no published figure for these rows; it has some for {listed}.")
    return found
