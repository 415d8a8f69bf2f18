"""The schema of a recipe: sections, keys with their defaults and descriptions, and combinations that are refused."""

from functools import partial
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from lightlm.model.config import ModelConfig
from lightlm.optim.registry import AnyOptimizer
from lightlm.optim.section import NO_EFFECT, Problem
from lightlm.quantities import parse_quantity

EARLIER_RUN = "earlier_run"  # in a validation's context: the recipe is that of a run, which must stay resumable


def span_tokens(span: str, total: int) -> int:
    """Return the tokens in a span, which is a share of `total` (`2%`) or a quantity (`375M`).

    Raises:
        ValueError: the span is neither, or the share is not between 0 and 100%.
    """
    try:
        if not span.endswith("%"):
            return parse_quantity(span)
        share = float(span[:-1])
    except ValueError:
        share = -1.0
    if not 0 <= share <= 100:  # also NaN
        raise ValueError("write a share of the run such as 2%, or tokens such as 375M")
    return round(total * share / 100)


def _check_span(span: str) -> str:
    span_tokens(span, 1)
    return span


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of recipes and runs: a plain folder name on every system


def _written_as(title: str, pattern: str, minimum: int = 0) -> WithJsonSchema:
    """Return the JSON Schema of a number that a recipe may also write as text, such as `10B` or `2%`."""
    return WithJsonSchema(
        {"title": title, "anyOf": [{"type": "number", "minimum": minimum}, {"type": "string", "pattern": pattern}]}
    )


_QUANTITY = r"\d[\d_]*(\.\d+)?([eE]\d+)?[kKmMbBtT]?"
Tokens = Annotated[
    int, BeforeValidator(parse_quantity), Field(ge=0), _written_as("tokens, such as 10B", f"^{_QUANTITY}$")
]
BatchTokens = Annotated[
    int,
    BeforeValidator(partial(parse_quantity, base=1024)),
    Field(ge=1),
    _written_as("tokens, such as 512K (2**19)", f"^{_QUANTITY}$", 1),
]
Span = Annotated[
    str,
    BeforeValidator(str),
    AfterValidator(_check_span),
    _written_as("share or tokens, such as 2% or 375M", rf"^({_QUANTITY}|\d+(\.\d+)?%)$"),
]


def _refuse(problems: list[Problem], info: ValidationInfo) -> None:
    """Raise the ValidationError that lists these problems, if there are any.

    The recipe of a run may hold settings without effect: earlier versions did not refuse all of them.
    """
    errors: list[InitErrorDetails] = [
        {"type": PydanticCustomError("problem", "{text}", {"text": text}), "loc": tuple(key.split(".")), "input": None}
        for key, text in problems
        if not (text.startswith(NO_EFFECT) and _is_earlier(info))
    ]
    if errors:
        raise ValidationError.from_exception_data("Recipe", errors)


def _is_earlier(info: ValidationInfo) -> bool:
    return bool(info.context and info.context.get(EARLIER_RUN))


class Section(BaseModel):
    """One section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def idle(self) -> dict[str, str]:
        """Return the settings that have no effect beside the others, each with the reason.

        A recipe may give one only its default, and no recipe file of a run holds one.
        """
        return {}

    def problems(self) -> list[Problem]:
        """Return the settings of this section that do not fit together."""
        default = {key: field.default for key, field in type(self).model_fields.items()}
        given = [(key, why) for key, why in self.idle().items() if getattr(self, key) != default[key]]
        return [(key, f"{NO_EFFECT} {why}; leave it out") for key, why in given]

    @model_serializer(mode="wrap")
    def _effective(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = self.idle()
        return {key: value for key, value in serialize(self).items() if key not in idle}


class DataSection(Section):
    dataset: str = Field(min_length=1)
    """Name of a folder under data/, or the path of a prepared folder."""


class TrainSection(Section):
    tokens: Annotated[Tokens, Field(ge=1)]
    """Tokens to train on in total, rounded up to whole batches."""
    batch_tokens: BatchTokens
    """Tokens per global batch. K and M are powers of 1,024 here, so 512K is 2**19. The batch does not depend on the
    number of devices: gradients accumulate."""
    seq_len: int = Field(default=0, ge=0)
    """Tokens per training sequence. 0 takes model.max_seq_len."""
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Sequences per device and forward pass. `auto` fits them to the device's memory."""
    seed: int = Field(default=1337, ge=-(2**63), lt=2**63)
    """Seed of the initial weights, the data order and the samples."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of matrix products. `auto` takes bfloat16 where the device is fast at it, float16 with a scaled loss on
    CUDA before Ampere, else float32; on a CPU, a new run measures. The run's recipe.yaml keeps the answer. Weights stay
    in float32."""
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Threads of a CPU, for a run of one process. `auto` measures for a second at the start, since another process on a
    core makes fewer threads faster; the run's recipe.yaml keeps the number, because sums are rounded by it. The
    variable OMP_NUM_THREADS decides wherever it is set, and `--nproc` shares the cores between the processes."""
    compile: Literal["auto"] | bool = "auto"
    """Use torch.compile. `auto` decides by device and by the length of the run."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the blocks, and compute the rest again in the backward pass: less memory, more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` keeps a copy of the model in each, `fsdp` shards one model (FSDP2)."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global L2 norm of the gradients. 0 does not clip."""
    skip_spikes: bool = False
    """Drop the update of a step whose loss or gradient norm is a spike, NaN or infinite."""
    spike_threshold: float = Field(default=6.0, gt=0)
    """Robust standard deviations above the median of the last steps at which a step is a spike."""
    spike_window: int = Field(default=128, ge=8)
    """Steps that a step is compared with to find spikes."""


class MoESection(Section):
    bias_update_rate: Annotated[float, Field(ge=0)] | None = None
    """Change of a selection bias per step, with router sigmoid. null takes 0.001 (DeepSeek-V3's); runs of a few hundred
    steps want 0.01."""
    balance_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Coefficient of the balance loss, which is 1 for a balanced layer, summed over layers. null takes 1e-4 with router
    sigmoid, within each sequence (DeepSeek-V3), and 1e-2 with softmax, over a forward pass (Switch Transformer)."""
    z_loss_coef: float = Field(default=0.0, ge=0)
    """Coefficient of mean(logsumexp(router logits)^2). ST-MoE uses 1e-3 (arXiv 2202.08906)."""


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
    def warms_batch_up(self) -> bool:
        return span_tokens(self.batch_warmup, 10**18) > 0

    @property
    def warms_up_again(self) -> bool:
        return span_tokens(self.rewarmup, 10**18) > 0

    def idle(self) -> dict[str, str]:
        keys = {"constant": ("decay", "decay_shape", "min_lr_ratio"), "wsd": ()}.get(self.name, ("decay_shape",))
        idle = dict.fromkeys(keys, f"with schedule.name={self.name}")
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


class EvalSection(Section):
    every: Tokens = 0
    """Training tokens between validations. 0 validates only at the end of the run."""
    tokens: Annotated[Tokens, Field(ge=1)] = 256_000
    """Tokens of the validation split that a validation reads, from its start."""
    prompts: list[str] = ["Hello, I am a language model,"]
    """Texts that the model continues at each validation."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Tokens to generate for each prompt."""
    tasks: list[str] = []
    """Tasks of lm-evaluation-harness to score during training."""
    tasks_every: Tokens = 0
    """Training tokens between scorings of eval.tasks. 0 scores only at the end."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Documents per task during training. null scores all of them."""
    data_dir: Annotated[str, Field(min_length=1)] | None = None
    """Folder with the tasks' data sets, laid out like the Hub. null takes $LIGHTLM_EVAL_DATA, or the Hub and its cache.
    """

    def idle(self) -> dict[str, str]:
        keys = () if self.tasks else ("tasks_every", "limit", "data_dir")
        idle = dict.fromkeys(keys, "without eval.tasks")
        return idle if self.prompts else idle | {"max_new_tokens": "without eval.prompts"}


class CheckpointSection(Section):
    every: Tokens = 0
    """Training tokens between checkpoints, besides every_minutes, the end and interruptions. 0 adds none."""
    every_minutes: float = Field(default=15, ge=0)
    """Minutes between checkpoints, by the clock: a kill or a crash costs no more. 0 turns this off."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints to keep. With 1 there is no older one to fall back on if a disk damages it."""
    keep_every: Tokens = 0
    """Training tokens between checkpoints that are never deleted. 0 keeps none for good."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues, from a copy in memory of 12 bytes per parameter."""


class TrackingSection(Section):
    backends: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers that receive the metrics besides metrics.jsonl (extra `lightlm[tracking]`)."""
    project: str = Field(default="lightlm", pattern=NAME_PATTERN)
    """Project name for wandb and trackio."""

    def idle(self) -> dict[str, str]:
        with_project = set(self.backends) & {"wandb", "trackio"}
        return {} if with_project else {"project": "without wandb or trackio in tracking.backends"}


class Recipe(BaseModel):
    """The description of a whole run, which `lightlm train` reads."""

    # protected_namespaces: pydantic reserves names that begin with `model_`, and a recipe has a section `model`.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the recipe, and of its run folder runs/NAME."""
    model: ModelConfig
    """Shape of the network."""
    data: DataSection
    """What to train on."""
    train: TrainSection
    """Length of the run, batches, device and precision."""
    optimizer: AnyOptimizer
    """Optimizer, its rates and weight decay."""
    moe: MoESection = MoESection()
    """Training of the routers, with model.num_experts."""
    schedule: ScheduleSection = ScheduleSection()
    """Learning rate and batch size over the run."""
    eval: EvalSection = EvalSection()
    """Validation, samples and tasks during training."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When to save, and what to keep."""
    tracking: TrackingSection = TrackingSection()
    """Experiment trackers."""

    @field_validator("*")
    @classmethod
    def _check_section(cls, section: Any, info: ValidationInfo) -> Any:
        found = [] if isinstance(section, str) else section.problems()  # the name is a string
        if isinstance(section, ModelConfig):
            found = list((dict(found) | dict(section.idle_given())).items())
        _refuse(found, info)
        return section

    @property
    def seq_len(self) -> int:
        return self.train.seq_len or self.model.max_seq_len

    @property
    def batch_sequences(self) -> int:
        """Sequences per global batch."""
        return self.train.batch_tokens // self.seq_len

    @property
    def router_training(self) -> MoESection:
        """The section `moe` with the defaults of `model.router` written out."""
        sigmoid, given = self.model.router == "sigmoid", self.moe
        rate = given.bias_update_rate if given.bias_update_rate is not None else 0.001
        balance = given.balance_loss_coef if given.balance_loss_coef is not None else 1e-4 if sigmoid else 1e-2
        return MoESection(
            bias_update_rate=rate if sigmoid else None, balance_loss_coef=balance, z_loss_coef=given.z_loss_coef
        )

    @model_serializer(mode="wrap")
    def _effective(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = serialize(self)
        if not self.model.num_experts:
            del values["moe"]
            return values
        return values | {"moe": {k: v for k, v in self.router_training.model_dump().items() if v is not None}}

    @model_validator(mode="after")
    def _check_whole(self, info: ValidationInfo) -> Self:
        """Refuse settings of different sections that do not fit together."""
        optimizer = self.optimizer.model_problems(tied=self.model.tie_embeddings)
        found = [(f"optimizer.{key}", message) for key, message in optimizer] + self._moe_problems()
        schedule, batch, tokens = self.schedule, self.train.batch_tokens, self.train.tokens
        spans = schedule.span_problems(tokens)
        found += [(f"schedule.{key}", message) for key, message in spans]
        if not spans and not _is_earlier(info) and (end := schedule.idle_end(tokens)):
            rest = f"{schedule.decay} of {schedule.name} leaves the last {1 - end / tokens:.0%} of the run at rate 0"
            found.append(("schedule.decay", f"{rest}; leave it out to fill the run, or set schedule.min_lr_ratio"))
        if self.seq_len > self.model.max_seq_len:
            found.append(("train.seq_len", f"{self.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}"))
        elif batch % self.seq_len:
            nearest = max(round(batch / self.seq_len), 1) * self.seq_len
            message = f"{batch} is not a whole number of {self.seq_len}-token sequences; nearest: {nearest}"
            found.append(("train.batch_tokens", message))
        elif self.train.micro_batch_size != "auto" and self.batch_sequences % self.train.micro_batch_size:
            message = f"{self.train.micro_batch_size} does not divide the {self.batch_sequences} sequences of a batch"
            found.append(("train.micro_batch_size", message))
        _refuse(found + self._batch_warmup_problems(), info)
        return self

    def _moe_problems(self) -> list[Problem]:
        given = [key for key, value in self.moe if key in self.moe.model_fields_set and value is not None]
        if not self.model.num_experts:
            return [(f"moe.{key}", f"{NO_EFFECT} without model.num_experts; leave it out") for key in given]
        if self.model.router == "softmax" and "bias_update_rate" in given:
            return [("moe.bias_update_rate", f"{NO_EFFECT} with model.router=softmax; leave it out")]
        return []

    def _batch_warmup_problems(self) -> list[Problem]:
        schedule, full, start = self.schedule, self.train.batch_tokens, self.schedule.batch_start
        if start is None or not schedule.warms_batch_up or full % self.seq_len:
            return []
        found = []
        if span_tokens(schedule.batch_warmup, self.train.tokens) > self.train.tokens:
            message = f"{schedule.batch_warmup} exceeds the run's {self.train.tokens:,} tokens; write a share: 10%"
            found.append(("schedule.batch_warmup", message))
        if start % self.seq_len or full % start or start == full:
            fitting = [n for n in range(1, self.batch_sequences) if self.batch_sequences % n == 0]
            nearest = min(fitting, key=lambda n: abs(n * self.seq_len - start), default=0) * self.seq_len
            message = (
                f"{start} must be smaller than train.batch_tokens {full}, divide it, and be a whole number of "
                f"{self.seq_len}-token sequences" + (f"; nearest: {nearest}" if nearest else "")
            )
            found.append(("schedule.batch_start", message))
        return found

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)
