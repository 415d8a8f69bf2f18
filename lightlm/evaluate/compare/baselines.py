"""Published scores of models under about 200M parameters, each with its source and what that says of the protocol.

They were not measured under one protocol: metric, prompt, harness and examples in the prompt differ, and SmolLM2's
ARC-Easy under lm-eval cannot be ranked with MobileLLM's. So a published figure never decides whether a model is
better; for that, name the model itself, which is then scored like yours. Imports nothing but the standard library.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.errors import UsageError

if TYPE_CHECKING:
    from lightlm.evaluate.compare.comparison import Answers

LM_EVAL = "lm-eval"
_TASKS = {"lambada": ("lambada_openai", "lambada_standard")}  # the source says LAMBADA, not which of the two
_NORMALISED = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "openbookqa")  # tasks with both acc and acc_norm


@dataclass(frozen=True)
class Source:
    """Where figures stand, and how they were measured as far as that is known.

    Args:
        title: the document.
        harness: what measured them; None where it is not stated.
        shots: examples in the prompt; "few" where their number is not stated, None where nothing is.
    """

    title: str
    harness: str | None
    shots: int | str | None = None


@dataclass(frozen=True)
class Figure:
    """A published score. Args: task: lm-eval's name; percent: as published; metric: None where it is not stated."""

    task: str
    percent: float
    source: Source
    metric: str | None = None

    @property
    def row(self) -> str:
        """The metric it stands beside. Where it is not stated, that is acc_norm for tasks that have it, else acc."""
        return self.metric or ("acc_norm" if self.task in _NORMALISED else "acc")

    def differences(self, num_fewshot: int | None, limit: int | None) -> list[str]:
        """What about the protocol is other than in a run of lm-eval with these settings, or is not known."""
        found = []
        if self.source.harness != LM_EVAL and not (self.source.harness or "").startswith(f"{LM_EVAL} "):
            found.append(self.source.harness or "harness not stated")
        if self.source.shots is None or num_fewshot is None:
            found.append("examples in the prompt not stated")
        elif self.source.shots != num_fewshot:
            found.append(f"{self.source.shots}-shot")
        if self.metric is None:
            found.append("metric not stated")
        if self.task in _TASKS:
            found.append("which LAMBADA not stated")
        if limit is not None:
            found.append("all documents")
        return found


@dataclass(frozen=True)
class Baseline:
    """A model with published scores. Args: tokens: it was trained on, as the source has it; note: for the legend."""

    name: str
    tokens: str | None
    figures: list[Figure] = field(repr=False)
    note: str = ""

    def find(self, task: str, metric: str) -> list[Figure]:
        """Its figures for a row of results; the first is the one that tables show."""
        return [f for f in self.figures if task in _TASKS.get(f.task, (f.task,)) and metric == f.row]

    def about(self) -> str:
        """Tokens and note, for a legend."""
        return "; ".join(part for part in (f"{self.tokens} tokens" if self.tokens else "", self.note) if part)

    def to_dict(self, answers: Iterable["Answers"], limit: int | None) -> dict[str, Any]:
        """For `--json`: its figures for the tasks of a run, each with what differs from the run's protocol."""
        figures = [
            {
                "task": one.row.task,
                "beside": one.row.metric,
                "metric": figure.metric,
                "value": figure.percent / 100,
                "source": figure.source.title,
                "harness": figure.source.harness,
                "num_fewshot": figure.source.shots,
                "differences": figure.differences(one.protocol.num_fewshot, limit),
            }
            for one in answers
            for figure in self.find(one.row.task, one.row.metric)
        ]
        return {"name": self.name, "tokens": self.tokens, "note": self.note, "figures": figures}


class Legend:
    """Published figures as cells of a table, and what is to be said of them below it: a letter for each source and
    protocol, and a star where that is not the run's or is not wholly stated."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._cut = False

    def cell(self, figure: Figure, num_fewshot: int | None, limit: int | None) -> str:
        """The figure beside a run of lm-eval with these settings: 0.389* (a)."""
        self._cut = self._cut or limit is not None
        star = "*" if figure.differences(num_fewshot, limit) else ""
        letter = self._texts.setdefault(self._about(figure), _letter(len(self._texts)))
        digits = 3 if round(figure.percent, 1) == figure.percent else 4
        return f"{figure.percent / 100:.{digits}f}{star} ({letter})"

    @staticmethod
    def _about(figure: Figure) -> str:
        source = figure.source
        shots = "examples in the prompt not stated" if source.shots is None else f"{source.shots}-shot"
        parts = [
            source.harness or "harness not stated",
            shots,
            *(["metric not stated"] if figure.metric is None else []),
        ]
        return f"{source.title}: {', '.join(parts)}"

    def lines(self, baselines: Iterable[Baseline] = ()) -> list[str]:
        """The legend; of the baselines what their sources say of the models. Empty if no cell was made."""
        if not self._texts:
            return []
        about = [f"{b.name}: {text}" for b in baselines if (text := b.about())]
        head = "Published figures, not measured here; * where the protocol is not this run's, or not wholly stated."
        if any("metric not stated" in text for text in self._texts):
            head += " One without its metric stands beside acc_norm, or acc where that is all a task has."
        if self._cut:
            head += " They are of all documents, the run's of fewer."
        return [head, *(f"({letter}) {text}" for text, letter in self._texts.items()), *about]


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else str(index)


_BUILD_NANOGPT = Source("build-nanogpt, hellaswag.py", LM_EVAL)
_NANOCHAT_0 = Source("nanochat, dev/estimate_gpt3_core.ipynb", "CORE", 0)
_NANOCHAT_10 = Source("nanochat, dev/estimate_gpt3_core.ipynb", "CORE", 10)
_GPT3_0 = Source("GPT-3 paper, table H.1", "the paper's own", 0)
_GPT3_FEW = Source("GPT-3 paper, table H.1", "the paper's own", "few")
_MOBILELLM = Source("MobileLLM README", "MobileLLM's own script", 0)
_PYTHIA = Source("EleutherAI/pythia, evals, step 143000", None, 5)
_SMOLLM = Source("SmolLM2-135M model card", "lighteval")
_MINIMIND = Source("minimind README", LM_EVAL)
_CODELION = Source("codelion/SmolLM2-70M model card", f"{LM_EVAL} 0.4.11")
_SEED = Source("this project's seed", None)

_COLUMNS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa", "boolq")


def _all(source: Source, *percents: float | None, metric: str | None = None) -> list[Figure]:
    """Figures in the order of `_COLUMNS`, None where there is none; a task with acc alone cannot mean acc_norm."""
    return [
        Figure(task, percent, source, "acc" if metric and task not in _NORMALISED else metric)
        for task, percent in zip(_COLUMNS, percents, strict=False)
        if percent is not None
    ]


BASELINES = [
    Baseline(
        "gpt2-124m",
        None,
        [
            Figure("hellaswag", 31.14, _BUILD_NANOGPT, "acc_norm"),
            Figure("hellaswag", 28.92, _BUILD_NANOGPT, "acc"),
            *_all(_NANOCHAT_0, 30.9),
            *_all(_NANOCHAT_10, None, 41.2, 22.2, 62.3),
            Figure("lambada", 32.3, _NANOCHAT_0),
        ],
    ),
    Baseline(
        "gpt3-125m",
        "300B",
        [*_all(_GPT3_0, 33.7), *_all(_GPT3_FEW, None, 42.7, 25.5, 64.3), Figure("lambada", 42.7, _GPT3_0)],
    ),
    # MobileLLM's README gives no tokens of OPT, GPT-Neo and Pythia: these are their papers', as remembered.
    Baseline("opt-125m", "180B", _all(_MOBILELLM, 31.1, 41.3, 25.2, 62.0, 50.8, 31.2, 57.5)),
    Baseline("gpt-neo-125m", "300B", _all(_MOBILELLM, 29.7, 40.7, 24.8, 62.5, 50.7, 31.6, 61.3)),
    Baseline(
        "pythia-160m",
        "300B",
        [*_all(_MOBILELLM, 29.9, 40.0, 25.3, 62.0, 50.9, 31.2, 59.5), Figure("lambada", 25.7, _PYTHIA)],
    ),
    Baseline("mobilellm-125m", "1T", _all(_MOBILELLM, 38.9, 43.9, 27.1, 65.3, 53.1, 39.5, 60.2)),
    Baseline("mobilellm-ls-125m", "1T", _all(_MOBILELLM, 39.5, 45.8, 28.7, 65.7, 52.1, 41.1, 60.4)),
    Baseline(
        "smollm-135m", "600B", _all(_SMOLLM, 41.2, None, None, 68.4, 51.3, 34.0), "ARC only as an average of 42.4"
    ),
    Baseline("smollm2-135m", "2T", _all(_SMOLLM, 42.1, None, None, 68.4, 51.3, 34.6), "ARC only as an average of 43.9"),
    Baseline("smollm2-135m-instruct", "2T+", _all(_MINIMIND, 43.15, 58.50, None, 68.17, None, 32.80)),
    Baseline("minimind-3-64m", None, _all(_MINIMIND, 28.28, 28.49, None, 50.65, None, 23.60), "mostly Chinese text"),
    Baseline(
        "codelion-smollm2-70m", "30.6B", _all(_CODELION, 26.1, 33.0, 22.4, 54.8, 50.0, 27.6, 39.7, metric="acc_norm")
    ),
    Baseline("lightlm-seed-124m", "40B", _all(_SEED, 33)),
]

_OTHER_NAMES = {
    "gpt2": "gpt2-124m",
    "gpt2-small": "gpt2-124m",
    "gpt3": "gpt3-125m",
    "gpt3-small": "gpt3-125m",
    "gptneo": "gpt-neo-125m",
    "mobilellm": "mobilellm-125m",
    "mobilellm-ls": "mobilellm-ls-125m",
    "minimind": "minimind-3-64m",
    "minimind-3": "minimind-3-64m",
    "smollm2-70m": "codelion-smollm2-70m",
}


def _plain(name: str) -> str:
    """GPT-2, gpt_2 and gpt2 are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_baseline(name: str) -> Baseline | None:
    """The baseline of this name, however it is capitalised and hyphenated; a size may be left out."""
    names = {_plain(baseline.name): baseline for baseline in BASELINES}
    names |= {_plain(other): names[_plain(own)] for other, own in _OTHER_NAMES.items()}
    return names.get(_plain(name)) if "/" not in name else None


def split_names(names: str) -> tuple[list[Baseline], list[str]]:
    """The baselines and the models among names with commas between; a name that could be both is the baseline's.

    Raises:
        UsageError: a name is neither a baseline's, nor that of a folder or run here, nor could it be a Hub id.
    """
    baselines, models = {}, []
    for name in dict.fromkeys(name.strip() for name in names.split(",") if name.strip()):
        if baseline := find_baseline(name):
            baselines[baseline.name] = baseline
        elif "/" in name or Path(name).exists() or Path("runs", name).exists():
            models.append(name)
        else:
            raise _unknown(name)
    return list(baselines.values()), models


def _unknown(name: str) -> UsageError:
    known = [baseline.name for baseline in BASELINES]
    near = difflib.get_close_matches(name.lower(), [*known, *_OTHER_NAMES], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return UsageError(
        f"--compare {name}: there are no published figures of that name, and no run or model folder; {hint}"
        f"Figures are known of {', '.join(known)}; a model of the Hub is named ORG/NAME"
    )
