"""Decision whether one model is better than another at a task, beyond the noise from the choice of documents.

The noise of training is a different one: another seed gives another model. Only runs with several seeds show it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from lightlm.evaluate.compare import paired
from lightlm.evaluate.compare.paired import Difference
from lightlm.evaluate.results.documents import Document, Value
from lightlm.evaluate.results.rows import ACCURACIES, Row, folded_tasks, leaf_tasks, rows
from lightlm.evaluate.results.truncation import UNCUT, Truncation, read_truncations

NOISE = (
    "Noise is the variation from the choice of documents. A difference beyond it is significant at 5% for all these "
    "comparisons together (p by Holm's method). Variation between training seeds is not included."
)
# Metrics that repeat another one, which is compared instead.
_SAME_FIGURES = {"byte_perplexity": "bits_per_byte", "word_perplexity": "bits_per_byte"}


@dataclass(frozen=True)
class Protocol:
    """Settings under which a model was scored.

    Args:
        version, num_fewshot, chat: figures that differ in these belong to different tasks.
        chat: how prompts become conversations; empty without a chat template or a system instruction.
        dtype, bos: these change scores slightly.
        chosen: settings that were asked for and change scores, such as another precision (see `Settings.chosen`).
    """

    version: Any = None
    num_fewshot: Any = None
    dtype: str | None = None
    bos: str | None = None
    chat: str = ""
    chosen: str = ""


@dataclass(frozen=True)
class Answers:
    """A model's figure on a task.

    Args:
        documents: the (hash, value) of each document by its number.
        truncation: how the task's requests were cut to fit the model's context.
        chance: the accuracy that guessing reaches; None if unknown or without choices.
        folded: tables and comparisons show a group that the task belongs to instead.
    """

    model: str
    row: Row
    protocol: Protocol
    documents: Mapping[int, tuple[str, Value]]
    truncation: Truncation = UNCUT
    chance: float | None = None
    folded: bool = False


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models' figures for one task and metric.

    Args:
        figures: those of the first model and of the second.
        documents: number of documents that both models were scored on.
        difference: second minus first; None if the figures cannot be compared, for the `reason`.
        p_value: the difference's, adjusted for the number of comparisons.
        share: the figure is a share of documents, written in percentage points.
        notes: differences in protocol that do not forbid a comparison.
    """

    figures: tuple[Answers, Answers]
    documents: int
    difference: Difference | None = None
    p_value: float = 1.0
    reason: str = ""
    share: bool = False
    notes: Sequence[str] = ()

    @property
    def task(self) -> str:
        """The task of both figures."""
        return self.figures[0].row.task

    @property
    def metric(self) -> str:
        """The metric of both figures."""
        return self.figures[0].row.metric

    @property
    def first(self) -> str:
        """The first model's name."""
        return self.figures[0].model

    @property
    def second(self) -> str:
        """The second model's name."""
        return self.figures[1].model

    @property
    def higher_is_better(self) -> bool | None:
        """None if unknown."""
        return self.figures[0].row.higher_is_better

    @property
    def too_few(self) -> bool:
        """Whether the documents are too few to tell: no outcome is significant, or test and interval disagree."""
        if self.difference is None or self.winner is not None:
            return False
        excludes_zero = not self.difference.low <= 0 <= self.difference.high
        significant = self.difference.p_value < paired.SIGNIFICANCE
        return self.documents < paired.FEWEST or excludes_zero != significant

    @property
    def winner(self) -> int | None:
        """Return 0 if the first model is better beyond noise, 1 if the second is, else None.

        Test and interval must agree, because the bootstrap interval is too narrow for a handful of documents.
        """
        if self.difference is None or self.higher_is_better is None:
            return None
        if self.p_value >= paired.SIGNIFICANCE or self.difference.low <= 0 <= self.difference.high:
            return None
        return int((self.difference.value > 0) == self.higher_is_better)

    def sentence(self) -> str:
        """Return the result in words: which model is better by how much, no difference, or not comparable."""
        where = f"at {self.task} {self.metric}"
        if self.difference is None:
            return f"{self.second} and {self.first} are not compared {where}: {self.reason}"
        amount, *facts = self.facts()
        if self.winner is None:
            return f"{self.second} against {self.first}: {self.verdict} {where} ({', '.join([amount, *facts])})"
        better, worse = (self.second, self.first) if self.winner else (self.first, self.second)
        return f"{better} is better than {worse} {where} by {amount} ({', '.join(facts)})"

    @property
    def verdict(self) -> str:
        """What the comparison says without a winner."""
        return "too few documents to tell" if self.too_few else "no difference beyond noise"

    def facts(self) -> list[str]:
        """Return the better model's lead, or how much better or worse the second is, then what supports it.

        The 95% interval stands only beside a verdict that it agrees with.
        """
        difference = self.difference
        assert difference is not None
        scale, digits = (100, 1) if self.share else (1, 4)
        unit = " points" if self.share else " bits per byte" if self.metric == "bits_per_byte" else ""

        def words(value: float, unit: str = "") -> str:
            if self.higher_is_better is None:
                return f"{scale * value:+.{digits}f}{unit}"
            size = f"{abs(scale * value):.{digits}f}"
            if self.winner is not None or not float(size):
                return f"{size}{unit}"
            return f"{size}{unit} {'better' if (value > 0) == self.higher_is_better else 'worse'}"

        facts = [words(difference.value, unit)]
        if not self.too_few:
            ends = [difference.low, difference.high]
            if self.winner is not None or ends[0] <= 0 <= ends[1]:
                ends = sorted(ends, key=abs) if self.winner is not None else ends
                facts.append(f"95% interval {words(ends[0])} to {words(ends[1])}")
            facts.append("p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.2g}")
        count = f"{self.documents:,} document{'s' * (self.documents != 1)}"
        return [*facts, count, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `--json`."""
        about = {key: getattr(self, key) for key in ("task", "metric", "first", "second", "documents")}
        about["notes"] = list(self.notes)
        if self.difference is None:
            return about | {"refused": self.reason}
        return about | {
            "difference": self.difference.value,
            "interval_95": [self.difference.low, self.difference.high],
            "p_value": self.difference.p_value,
            "p_value_holm": self.p_value,
            "method": self.difference.method,
            "beyond_noise": self.winner is not None,
            "higher_is_better": self.higher_is_better,
            "too_few_documents": self.too_few,
            "better": None if self.winner is None else (self.first, self.second)[self.winner],
        }


def answers_of(
    model: str, results: Mapping[str, Any], documents: Sequence[Document], facts: Mapping[str, Any]
) -> list[Answers]:
    """Return every figure of a results file, with its value for each document if known.

    Args:
        results: lm-eval's results.
        documents: the content of `<name>.documents.jsonl`.
        facts: the content of `<name>.meta.json`.
    """
    by_task = {task: list(group) for task, group in groupby(documents, lambda document: document.task)}
    folded = folded_tasks(results)
    dtype = facts.get("dtype") or (results.get("config") or {}).get("model_dtype")
    # Which token comes before contexts depends on the tokenizer, so only whether one does is compared.
    bos = facts.get("bos")
    before = bos.get("before_contexts") if isinstance(bos, dict) else None
    precedes = None if before is None else "yes" if before else "no"
    truncations, chances = read_truncations(facts), facts.get("chances") or {}
    found = []
    for row in rows(dict(results)):
        version, shots = (results.get(key, {}).get(row.task) for key in ("versions", "n-shot"))
        precision = str(dtype).removeprefix("torch.") if dtype else None
        protocol = Protocol(version, shots, precision, precedes, _chat(results, row.task), facts.get("chosen") or "")
        # A group that stands for its tasks has their documents, numbered anew.
        members = [task for task in leaf_tasks(results, row.task) if task in folded]
        scored = [document for task in members or [row.task] for document in by_task.get(task, ())]
        values = {
            number if members else document.doc_id: (document.doc_hash, document.metrics[row.metric])
            for number, document in enumerate(scored)
            if row.metric in document.metrics
        }
        if members and len(values) == len(scored):
            row = replace(row, documents=len(values) or None)
        cut = truncations.get(row.task, UNCUT)
        chance = chances.get(row.task) if row.metric.startswith(ACCURACIES) else None
        found.append(Answers(model, row, protocol, values, cut, chance, row.task in folded))
    return found


def compare(first: Answers, second: Answers) -> Comparison:
    """Compare two models' figures for the same task and metric."""
    row, ours, theirs, figures = first.row, first.protocol, second.protocol, (first, second)
    if ours.version != theirs.version:
        return Comparison(figures, 0, reason=f"task versions {ours.version} and {theirs.version}")
    if ours.num_fewshot != theirs.num_fewshot:
        return Comparison(figures, 0, reason=f"{ours.num_fewshot} and {theirs.num_fewshot} examples in the prompt")
    if ours.chat != theirs.chat:
        return Comparison(figures, 0, reason=f"prompts {ours.chat or 'as text'} and {theirs.chat or 'as text'}")
    if not (first.documents and second.documents):
        model = second.model if first.documents else first.model
        return Comparison(figures, 0, reason=f"{model} has no scores per document; score it again")
    hashes = [{i: document[0] for i, document in answers.documents.items()} for answers in (first, second)]
    if hashes[0] != hashes[1]:
        counts = f"{len(first.documents):,} and {len(second.documents):,}"
        return Comparison(figures, 0, reason=f"they were scored on different documents ({counts})")
    numbers = sorted(first.documents)
    (x_N, w_N), (y_N, v_N) = (_columns([answers.documents[i][1] for i in numbers]) for answers in (first, second))
    form = paired.form_of(x_N, w_N, row.value)
    if form is None or not np.array_equal(w_N, v_N) or paired.form_of(y_N, v_N, second.row.value) is not form:
        return Comparison(figures, len(numbers), reason="the figure is not a mean over documents")
    share = bool((w_N == 1).all() and min(x_N.min(), y_N.min()) >= 0 and max(x_N.max(), y_N.max()) <= 1)
    settings = [("", ours.dtype, theirs.dtype), ("BOS ", ours.bos, theirs.bos)]
    notes = [f"{what}{a} against {b}" for what, a, b in settings if None not in (a, b) and a != b]
    if first.truncation.cut or second.truncation.cut:
        shares = (f"{one.truncation.cut / max(1, one.truncation.requests):.0%}" for one in (first, second))
        notes.append(f"{' and '.join(shares)} of requests cut")
    difference = paired.difference(x_N, y_N, w_N, form)
    return Comparison(figures, len(numbers), difference, difference.p_value, share=share, notes=notes)


def _chat(results: Mapping[str, Any], task: str) -> str:
    """Return how lm-eval's results say that prompts were written, if not as text; empty for tasks without prompts."""
    if (results.get("configs") or {}).get(task, {}).get("output_type") == "loglikelihood_rolling":
        return ""
    facts = ["with a chat template"] if results.get("chat_template") else []
    if results.get("chat_template") and results.get("n-shot", {}).get(task):
        facts += [] if results.get("fewshot_as_multiturn") else ["examples in one turn"]
    instruction = results.get("system_instruction")
    return ", ".join([*facts, *([f"system instruction {instruction!r}"] if instruction else [])])


def _columns(values: Sequence[Value]) -> tuple[paired.Floats, paired.Floats]:
    """Return numerators and denominators (N,)."""
    pairs = [value if isinstance(value, tuple) else (value, 1.0) for value in values]
    x_N, w_N = np.array(pairs, dtype=np.float64).T
    return x_N, w_N


def compare_all(models: Sequence[Sequence[Answers]]) -> list[Comparison]:
    """Compare each model with the first, for every figure that both have, with p-values adjusted for all of them.

    Groups are skipped in favor of their tasks, except large ones (`folded_tasks`).
    """
    return adjust([comparison for second in models[1:] for comparison in compare_pair(models[0], second)])


def compare_pair(first: Sequence[Answers], second: Sequence[Answers]) -> list[Comparison]:
    """Compare a model with another, for every figure that both have, with p-values that are not adjusted."""
    others = {(answers.row.task, answers.row.metric): answers for answers in second}
    metrics = {(answers.row.task, answers.row.metric) for answers in first}
    found = []
    for answers in first:
        task, metric = key = answers.row.task, answers.row.metric
        repeated = (task, _SAME_FIGURES.get(metric)) in metrics
        if key in others and answers.row.documents is not None and not (repeated or answers.folded):
            found.append(compare(answers, others[key]))
    return found


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with p-values adjusted for all that are shown together.

    Many comparisons give some small p-values by chance, so Holm's method adjusts them: of two runs that differed only
    in their seed, one of 12 figures had p = 0.012.
    """
    found = list(comparisons)
    tested = [i for i, comparison in enumerate(found) if comparison.difference]
    for i, p_value in zip(tested, paired.holm([found[i].p_value for i in tested]), strict=True):
        found[i] = replace(found[i], p_value=p_value)
    return found


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the comparisons in words: a sentence per winner, then one per pair of models and reason for the others."""
    found = [comparison.sentence() for comparison in comparisons if comparison.winner is not None]
    alike: dict[tuple[str, str, str, bool], list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.winner is None:
            key = (comparison.first, comparison.second, comparison.reason, comparison.too_few)
            alike.setdefault(key, []).append(comparison)
    for (first, second, reason, _), group in alike.items():
        names = [f"{one.task} {one.metric}" for one in group]
        if len(group) == 1:
            found.append(group[0].sentence())
        elif reason:
            found.append(f"{second} and {first} are not compared at {', '.join(names)}: {reason}")
        else:
            facts = (f"{name} ({', '.join(one.facts())})" for name, one in zip(names, group, strict=True))
            found.append(f"{second} against {first}: {group[0].verdict} at {'; '.join(facts)}")
    return found
