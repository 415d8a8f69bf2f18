"""Published scores of models under about 200M parameters, read from `baselines.yaml`.

Metric, prompt, harness and number of examples differ between sources, so a published figure never decides whether a
model is better. For that, name the model itself: LightLM then scores it under the protocol of your run.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightlm.errors import UsageError
from lightlm.evaluate.results import board
from lightlm.evaluate.settings import split_list
from lightlm.names import note_clash, warn
from lightlm.quantities import parse_quantity
from lightlm.runs import RUNS

if TYPE_CHECKING:
    from lightlm.evaluate.compare.comparison import Answers, Protocol

_TASKS = {"lambada": ("lambada_openai", "lambada_standard")}  # the sources do not say which of the two
_NORMALIZED = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "openbookqa")  # tasks with both acc and acc_norm


@dataclass(frozen=True)
class Source:
    """A publication and its protocol.

    Args:
        harness: the program that measured the figures; None if not stated.
        num_fewshot: examples in the prompt; "few" if their number is not stated, None if nothing is.
    """

    title: str
    url: str
    harness: str | None
    num_fewshot: int | str | None


@dataclass(frozen=True)
class Figure:
    """A published score.

    Args:
        task: lm-eval's name, or `open_slm`.
        percent: as published; the index in points.
        metric: None if not stated.
        computed: whether it follows from the source's other figures.
    """

    task: str
    percent: float
    source: Source
    metric: str | None = None
    computed: bool = False

    @property
    def value(self) -> float:
        """The score as in tables: a share, or the index in points."""
        return self.percent if self.task == board.BOARD else self.percent / 100

    def differences(self, num_fewshot: int | None, limit: int | None, chat: str = "") -> list[str]:
        """Return what differs from a run of lm-eval with these settings, or is not stated."""
        shots = self.source.num_fewshot
        facts = {
            self.source.harness or "harness not stated": (self.source.harness or "").split(" ")[0] != "lm-eval",
            "examples in the prompt not stated": shots is None or num_fewshot is None,
            f"{shots}-shot": None not in (shots, num_fewshot) and shots != num_fewshot,
            "metric not stated": self.metric is None,
            "which LAMBADA not stated": self.task in _TASKS,
            "all documents": limit is not None,
            "prompts as text": bool(chat),
        }
        return [fact for fact, differs in facts.items() if differs]


@dataclass(frozen=True)
class Baseline:
    """A model with published scores. Args: tokens: size of its training data; note: for the legend."""

    name: str
    figures: list[Figure] = field(repr=False)
    other_names: tuple[str, ...] = ()
    tokens: str | None = None
    tokens_source: str | None = None
    note: str = ""

    @property
    def size(self) -> float:
        """The number of tokens, infinite if unknown: tables order models by it."""
        return parse_quantity(self.tokens) if self.tokens else float("inf")

    def find(self, task: str, metric: str) -> list[Figure]:
        """Return its figures for a row of results; tables show the first.

        A figure without a stated metric stands beside acc_norm, or beside acc if the task has only that.
        """
        figures = [figure for figure in self.figures if task in _TASKS.get(figure.task, (figure.task,))]
        default = "acc_norm" if task in _NORMALIZED else "acc"
        metric = metric.removesuffix(f" ({board.OFF_PROTOCOL})")
        return [figure for figure in figures if metric == (figure.metric or default)]

    def to_dict(self, answers: Iterable["Answers"], limit: int | None) -> dict[str, Any]:
        """Return the content of `--json`: figures for the tasks of a run, each with its differences in protocol."""
        figures = [
            {
                "task": one.row.task,
                "beside": one.row.metric,
                "metric": figure.metric,
                "value": figure.value,
                "computed": figure.computed,
                "source": figure.source.title,
                "url": figure.source.url,
                "harness": figure.source.harness,
                "num_fewshot": figure.source.num_fewshot,
                "differences": figure.differences(one.protocol.num_fewshot, limit, one.protocol.chat),
            }
            for one in answers
            for figure in self.find(one.row.task, one.row.metric)
        ]
        return {"name": self.name, "tokens": self.tokens, "note": self.note, "figures": figures}


class Legend:
    """Writer of published figures as table cells, and of the legend below the table.

    Each source and protocol gets a letter. A star marks a protocol that differs from the run's or is partly unknown.
    """

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}  # by the legend's text
        self._cut = False

    def cell(self, figure: Figure, protocol: "Protocol", limit: int | None) -> str:
        """Return the figure beside a run of lm-eval with these settings: `0.389* (a)`."""
        self._cut = self._cut or limit is not None
        star = "*" if figure.differences(protocol.num_fewshot, limit, protocol.chat) else ""
        source, shots = figure.source, figure.source.num_fewshot
        about = f"{source.title}: {source.harness or 'harness not stated'}, "
        about += "examples in the prompt not stated" if shots is None else f"{shots}-shot"
        about += ", metric not stated" if figure.metric is None else ""
        about += ", computed from its scores" if figure.computed else ""
        index = len(self._letters)
        letter = self._letters.setdefault(about, chr(ord("a") + index) if index < 26 else str(index))
        digits = 2 if figure.value == figure.percent else 3 if round(figure.percent, 1) == figure.percent else 4
        return f"{figure.value:.{digits}f}{star} ({letter})"

    def lines(self, baselines: Iterable[Baseline] = ()) -> list[str]:
        """Return the legend, with what is known about the baselines; empty if no cell was written."""
        if not self._letters:
            return []
        head = "Published figures, not measured here; * marks a protocol that differs from this run's or is not stated."
        if any("metric not stated" in text for text in self._letters):
            head += " A figure without a stated metric is shown with acc_norm, or with acc if the task has only that."
        if self._cut:
            head += " Published figures use all documents; this run uses fewer."
        facts = {b.name: "; ".join(filter(None, (b.tokens and f"{b.tokens} tokens", b.note))) for b in baselines}
        about = [f"{name}: {text}" for name, text in facts.items() if text]
        return [head, *(f"({letter}) {text}" for text, letter in self._letters.items()), *about]


@functools.cache
def load_baselines() -> list[Baseline]:
    """Read `baselines.yaml`."""
    content = yaml.safe_load(Path(__file__).with_name("baselines.yaml").read_text(encoding="utf-8"))
    sources = {key: Source(**values) for key, values in content["sources"].items()}
    found = []
    for name, values in content["baselines"].items():
        figures = [
            Figure(task, percent, sources[scores["source"]], scores.get("metric"))
            for scores in values.pop("scores")
            for task, percent in scores["percent"].items()
        ]
        figures += _indices(figures)
        found.append(Baseline(name, figures, tuple(values.pop("other_names", ())), **values))
    return found


def _indices(figures: Iterable[Figure]) -> list[Figure]:
    """Return the leaderboard's index and the part index of each source that has the scores but not the figure."""
    by_source: dict[Source, dict[tuple[str, str | None], float]] = {}
    for figure in figures:
        by_source.setdefault(figure.source, {}).setdefault((figure.task, figure.metric), figure.value)
    found = []
    for source, values in by_source.items():
        scores = {
            task: values[task, part.metric] for task, part in board.PARTS.items() if (task, part.metric) in values
        }
        for chosen in (scores, {task: value for task, value in scores.items() if task != board.ARITHMARK}):
            metric = board.metric_of(chosen)
            if metric is not None and (board.BOARD, metric) not in values:
                values[board.BOARD, metric] = board.index(chosen)
                found.append(Figure(board.BOARD, values[board.BOARD, metric], source, metric, computed=True))
    return found


def find_baseline(name: str) -> Baseline | None:
    """Return the baseline of this name or other name; capitals and hyphens do not matter."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = {plain(known): one for one in load_baselines() for known in (one.name, *one.other_names)}
    return None if "/" in name else names.get(plain(name))


def split_names(names: str, note: Callable[[str], None] = warn) -> tuple[list[Baseline], list[str]]:
    """Split comma-separated names into baselines, by their tokens, and models; a name that fits both is a baseline.

    A run or folder here with the name of a baseline is named in a note (see `lightlm.names`).

    Raises:
        UsageError: a name is not a baseline, not a folder or run here, and not a Hub id.
    """
    baselines, models = {}, []
    for name in dict.fromkeys(split_list(names)):
        if baseline := find_baseline(name):
            note_clash(
                f"--compare {name}", f"published figures of {baseline.name}", [Path(RUNS, name), Path(name)], note
            )
            baselines[baseline.name] = baseline
        elif "/" in name or Path(name).exists() or Path(RUNS, name).exists():
            models.append(name)
        else:
            known = {one.name: one.other_names for one in load_baselines()}
            near = difflib.get_close_matches(name.lower(), [*known, *chain(*known.values())], n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise UsageError(
                f"--compare {name}: not a model with published figures, and not a run or model folder here; {hint}"
                f"Published figures exist for {', '.join(known)}. Name a model on the Hub as ORG/NAME"
            )
    return sorted(baselines.values(), key=lambda baseline: baseline.size), models
