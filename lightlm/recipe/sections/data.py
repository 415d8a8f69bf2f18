"""The section `data`: what to train on, and in which shares."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from lightlm.optim.section import Problem
from lightlm.quantities.types import Span, span_tokens
from lightlm.recipe.sections.section import Section

Part = tuple[str | None, dict[str, float]]  # where a stage ends, and the weights of its folders
SOURCES = ("dataset", "mix", "stages")  # exactly one of them says what to train on


def _check_weight(weight: Any) -> Any:
    if isinstance(weight, bool | str):
        raise ValueError("write a number such as 0.7")
    return weight


def _check_weights(mix: dict[str, float]) -> dict[str, float]:
    if not mix:
        raise ValueError("names no folder; write {NAME: WEIGHT, ...}")
    if "" in mix:
        raise ValueError("has an empty name")
    if not sum(mix.values()):
        raise ValueError("the weights sum to 0; give at least one folder a weight above 0")
    return mix


Weight = Annotated[float, BeforeValidator(_check_weight), Field(ge=0)]
Mix = Annotated[
    dict[str, Weight],
    AfterValidator(_check_weights),
    WithJsonSchema(
        {
            "title": "folders with weights, such as {fineweb-edu: 0.7, cosmopedia-v2: 0.3}",
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": "number", "minimum": 0},
        }
    ),
]


class Stage(Section):
    """A part of a run with a mixture of its own."""

    until: Span | None = None
    """Tokens of the run, or share of it, at which the next stage begins. The last stage has none."""
    mix: Mix | None = None
    """Folders with weights."""
    dataset: Annotated[str, Field(min_length=1)] | None = None
    """One folder, in place of a mix."""

    def idle(self) -> dict[str, str]:
        return {key: "unless given" for key in ("until", "mix", "dataset") if getattr(self, key) is None}

    @property
    def weights(self) -> dict[str, float]:
        return self.mix if self.mix is not None else {self.dataset: 1.0} if self.dataset is not None else {}


class DataSection(Section):
    dataset: Annotated[str, Field(min_length=1)] | None = None
    """Name of a folder under data/, or the path of a prepared folder. One of dataset, mix and stages is required."""
    mix: Mix | None = None
    """Several folders with one tokenizer, in place of a dataset: each with its weight, its share of the sequences after
    division by the sum."""
    stages: (
        Annotated[
            list[Stage],
            Field(min_length=1),
            WithJsonSchema({"title": "list of {until, mix or dataset}", "type": "array", "items": {"type": "object"}}),
        ]
        | None
    ) = None
    """Mixtures after each other, in place of a mix: [{until: 80%, mix: {...}}, {mix: {...}}]. A stage ends at its
    `until`, tokens or a share of the run; the last one has none. A stage may name one `dataset`."""
    shift_windows: bool = False
    """Cut a folder's text into sequences at another offset in each epoch but the first, so that a repeated text does
    not begin and end at the same places."""
    document_mask: bool = False
    """Let no token attend to another document than its own, in training and validation. A document begins with the
    end-of-text token that separates it from the one before."""

    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of a conversation that is longer than a sequence: it loses its end, or it is left out."""

    def idle(self) -> dict[str, str]:
        return {key: "unless given" for key in SOURCES if getattr(self, key) is None}

    @property
    def parts(self) -> list[Part]:
        """The stages of the run; one without end for a dataset or a mix."""
        if self.stages is not None:
            return [(stage.until, stage.weights) for stage in self.stages]
        return [(None, Stage(mix=self.mix, dataset=self.dataset).weights)]

    @property
    def sources(self) -> list[str]:
        """The folders that have a weight above 0 in some stage, in the order in which the recipe names them."""
        return list(dict.fromkeys(name for _, mix in self.parts for name, weight in mix.items() if weight))

    @property
    def main(self) -> str:
        """The folder with the largest weight at the end of the run, the first of equals: heldout reads it."""
        weights = self.parts[-1][1]
        return max(weights, key=lambda name: weights[name])

    @property
    def key(self) -> str:
        """The key that says what to train on, such as `data.mix`."""
        return f"data.{next(key for key in SOURCES if getattr(self, key) is not None)}"

    def problems(self) -> list[Problem]:
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if not given:
            return [("dataset", "is missing; name a folder, or give several with data.mix or data.stages")]
        found = super().problems()
        found += [(key, f"excludes data.{given[0]}; keep one of the two") for key in given[1:]]
        for number, stage in enumerate(self.stages or ()):
            where, last = f"stages.{number}", number == len(self.stages or ()) - 1
            if (stage.mix is None) == (stage.dataset is None):
                found.append(
                    (where, "needs a mix or a dataset" if stage.mix is None else "has both a mix and a dataset")
                )
            if last and stage.until is not None:
                found.append((f"{where}.until", f"{stage.until}: the last stage ends with the run; leave until out"))
            elif not last and stage.until is None:
                found.append((f"{where}.until", "is missing: only the last stage ends with the run"))
        return found

    def span_problems(self, tokens: int) -> list[Problem]:
        """Return the stages that do not fit a run of this many tokens."""
        found, before = [], 0
        for number, stage in enumerate((self.stages or ())[:-1]):
            if stage.until is None:
                continue
            end = span_tokens(stage.until, tokens)
            if end >= tokens:
                message = f"{stage.until} leaves nothing of the run's {tokens:,} tokens to the next stage"
                found.append((f"stages.{number}.until", f"{message}; write a share such as 80%"))
            elif end <= before:
                start = f"{before:,} tokens, where it begins" if before else "0"
                found.append((f"stages.{number}.until", f"{stage.until} is not above {start}"))
            before = max(before, end)
        return found
