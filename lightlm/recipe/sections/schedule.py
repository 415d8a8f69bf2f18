"""The section `schedule`: learning rate and batch size over the run."""

import itertools
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from lightlm.optim.section import Problem
from lightlm.quantities.types import BatchTokens, Span, Tokens, span_tokens
from lightlm.recipe.sections.section import Section

_DECAY_SHAPES = ("constant", "linear", "cosine")
_DECAY_POINT = {
    "type": "array",
    "prefixItems": [{"type": ["number", "string"]}, {"type": "number", "minimum": 0}],
    "minItems": 2,
    "maxItems": 2,
}


def _check_decay_shape(value: Any) -> Any:
    """Name what is allowed in one message; as a union, each member would have its own."""
    points = isinstance(value, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)
    if value in _DECAY_SHAPES if isinstance(value, str) else value and points:
        return value
    raise ValueError(
        "write constant, linear, cosine, or points such as [[0%, 1], [50%, 0.1], [100%, 1]]: where in the run, and the "
        "share of optimizer.weight_decay there"
    )


WeightDecayShape = Annotated[
    Literal["constant", "linear", "cosine"] | tuple[tuple[Span, Annotated[float, Field(ge=0)]], ...],
    BeforeValidator(_check_decay_shape),
    WithJsonSchema(
        {
            "title": "constant | linear | cosine | points, such as [[0%, 1], [100%, 0]]",
            "anyOf": [{"enum": list(_DECAY_SHAPES)}, {"type": "array", "items": _DECAY_POINT, "minItems": 1}],
        }
    ),
]


class ScheduleSection(Section):
    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Shape of the learning rate after the warmup: `wsd` stays at the peak, then decays; `cosine` and `linear` decay
    from the warmup on; `constant` stays."""
    warmup: Span = "2%"
    """Linear rise of the learning rate from 0 to its peak."""
    decay: Span | None = None
    """Length of the decay. null takes the last 20% with wsd (SmolLM2-135M's share), and all that remains after the
    warmup with cosine and linear."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """Shape of the wsd decay. `sqrt` falls as 1 - sqrt(x) (arXiv 2405.18392)."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of the decay, as a fraction of the peak."""
    weight_decay: WeightDecayShape = "constant"
    """Weight decay over the run, as a share of optimizer.weight_decay. `linear` and `cosine` fall from 1 at the start
    to 0 at the end (nanochat's). Points, such as [[0%, 1], [13%, 1], [53%, 0.125], [100%, 1.2]], are joined by lines
    (slowrun holds, drops and raises it). A step decays by this times its learning rate, which has its own shape."""
    rewarmup: Span = "0%"
    """In a resumed run: linear rise of the learning rate from 0 to what the schedule says, after train.tokens was
    raised behind a decay."""
    rewarmup_from: Tokens | None = None
    """Tokens at which rewarmup begins. null takes those of the checkpoint from which the run resumes."""
    batch_warmup: Span = "0%"
    """Part of the run in which the batch doubles from batch_start to train.batch_tokens."""
    batch_start: BatchTokens | None = None
    """Tokens of the first batch, required with batch_warmup."""

    @property
    def decay_span(self) -> str | None:
        """Length of the decay; None is all that remains after the warmup."""
        return self.decay or ("20%" if self.name == "wsd" else None)

    @property
    def decays(self) -> bool:
        """Whether the learning rate has a decay."""
        return self.name != "constant" and span_tokens(self.decay_span or "100%", 10**18) > 0

    @property
    def warms_batch_up(self) -> bool:
        return span_tokens(self.batch_warmup, 10**18) > 0

    @property
    def warms_up_again(self) -> bool:
        return span_tokens(self.rewarmup, 10**18) > 0

    def idle(self) -> dict[str, str]:
        keys = {"constant": ("decay", "decay_shape", "min_lr_ratio"), "wsd": ()}.get(self.name, ("decay_shape",))
        idle = dict.fromkeys(keys, f"with schedule.name={self.name}")
        if self.name == "wsd" and not self.decays:
            idle = dict.fromkeys(("decay_shape", "min_lr_ratio"), f"with schedule.decay={self.decay}")
        if not self.warms_batch_up:
            idle["batch_start"] = "without schedule.batch_warmup"
        if not self.warms_up_again:
            idle |= dict.fromkeys(("rewarmup", "rewarmup_from"), "without a length in schedule.rewarmup")
        return idle

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.warms_batch_up and self.batch_start is None:
            found.append(("batch_start", f"is missing: batch_warmup {self.batch_warmup} needs a first batch"))
        shares = [span_tokens(span, 10**6) for span in (self.warmup, self.decay or "0%") if span.endswith("%")]
        if sum(shares) > 10**6:
            found.append(("decay", f"warmup {self.warmup} and decay {self.decay} exceed the run"))
        return found

    def decay_points(self, tokens: int) -> list[tuple[int, float]]:
        """Return the points of weight_decay in a run of this many tokens; none if it has a name."""
        if isinstance(self.weight_decay, str):
            return []
        return [(span_tokens(span, tokens), share) for span, share in self.weight_decay]

    def decay_point_problems(self, tokens: int) -> list[Problem]:
        """Return what is wrong with the order of weight_decay's points in a run of this many tokens."""
        if isinstance(self.weight_decay, str):
            return []
        written = [span for span, _ in self.weight_decay]
        ends = [span_tokens(span, tokens) for span in written]
        found = [
            ("weight_decay", f"point {late} comes after {early}; write the points in the order of the run")
            for (early, late), (a, b) in zip(itertools.pairwise(written), itertools.pairwise(ends), strict=True)
            if b < a
        ]
        if not found and ends[-1] > tokens:
            message = f"point {written[-1]} lies beyond the run's {tokens:,} tokens; write shares, such as 100%"
            found.append(("weight_decay", message))
        return found

    def span_problems(self, tokens: int) -> list[Problem]:
        """Return the spans that exceed a run of this many tokens."""
        warmup, decay = (span_tokens(span or "0%", tokens) for span in (self.warmup, self.decay_span))
        decays = self.name != "constant"
        if warmup + decay * decays <= tokens:
            return []
        # A span in tokens was chosen for a run of another length: a share fits every length.
        shares = {"warmup": (self.warmup, "2%"), "decay": (self.decay or "%", "20%" if self.name == "wsd" else "null")}
        absolute = [key for key, (span, _) in shares.items() if not span.endswith("%") and (decays or key == "warmup")]
        advice = " ".join(f"schedule.{key}={shares[key][1]}" for key in absolute)
        both = f" and decay {self.decay_span} exceed" if decay and decays else " exceeds"
        hint = f"; write {advice}" if advice else ""
        return [(next(iter(absolute), "warmup"), f"warmup {self.warmup}{both} the run's {tokens:,} tokens{hint}")]

    def idle_end(self, tokens: int) -> int | None:
        """Return the tokens after which the rest of a run of `tokens` tokens has a learning rate of 0, or None."""
        if self.name not in ("cosine", "linear") or self.min_lr_ratio or self.decay is None:
            return None
        end = span_tokens(self.warmup, tokens) + span_tokens(self.decay, tokens)
        return end if end < tokens else None
