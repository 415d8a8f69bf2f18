"""The schema of a recipe: its sections, their defaults, and what does not fit together."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from lightlm.model.config import ModelConfig
from lightlm.optim.registry import AnyOptimizer
from lightlm.optim.section import Problem
from lightlm.quantities import parse_quantity


def _parse_batch(text: str | int | float) -> int:
    return parse_quantity(text, base=1024)


def _check_span(span: str) -> str:
    span_tokens(span, 1)
    return span


def span_tokens(span: str, total: int) -> int:
    """Tokens in a span written as a share of the run (`2%`) or as a quantity (`375M`)."""
    if not span.endswith("%"):
        return parse_quantity(span)
    try:
        share = float(span[:-1])
    except ValueError:
        share = -1.0
    if not 0 <= share <= 100:
        raise ValueError("write a share of the run such as 2%, or tokens such as 375M")
    return round(total * share / 100)


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of recipes and runs: a plain folder name on every system

Tokens = Annotated[int, BeforeValidator(parse_quantity), Field(ge=0)]
BatchTokens = Annotated[int, BeforeValidator(_parse_batch), Field(ge=1)]
Span = Annotated[str, BeforeValidator(str), AfterValidator(_check_span)]


class Section(BaseModel):
    """One section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def idle(self) -> dict[str, str]:
        """Settings without effect beside the others, and why: refused where given, left out of a resolved recipe."""
        return {}

    def problems(self) -> list[Problem]:
        """What does not fit together within the section."""
        idle = self.idle().items()
        return [(key, f"has no effect {why}; leave it out") for key, why in idle if key in self.model_fields_set]

    @model_serializer(mode="wrap")
    def _effective(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = self.idle()
        return {key: value for key, value in serialize(self).items() if key not in idle}


class DataSection(Section):
    dataset: str = Field(min_length=1)  # a name under data/, or the path of a prepared folder


class TrainSection(Section):
    tokens: Tokens  # to train on in total, rounded up to whole batches
    batch_tokens: BatchTokens  # global batch; K and M are powers of 1,024 here, so 512K is 2**19
    seq_len: Annotated[int, Field(ge=0)] = 0  # 0: model.max_seq_len
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"  # sequences a forward pass
    seed: int = 1337
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    activation_checkpointing: bool = False  # keep only the blocks' inputs; the backward pass computes the rest again
    parallel: Literal["ddp", "fsdp"] = "ddp"  # with many processes: a copy of the model in each, or shards of one
    grad_clip: Annotated[float, Field(ge=0)] = 1.0  # largest global gradient norm; 0 leaves gradients alone
    skip_spikes: bool = False  # drop the gradients of a step whose loss or gradient norm is a spike or no number
    spike_threshold: Annotated[float, Field(gt=0)] = 6.0  # standard deviations above the last steps' median
    spike_window: Annotated[int, Field(ge=8)] = 128  # the steps compared with

    def problems(self) -> list[Problem]:
        return [("tokens", "must be above 0")] if self.tokens == 0 else []


class MoESection(Section):
    """How routers are trained, with model.num_experts. A null is the default for the kind of `model.router`."""

    bias_update_rate: Annotated[float, Field(ge=0)] | None = None  # sigmoid: of the selection bias, a step; 0.001
    # Of the loss that counts a balanced layer as 1, layers summed. sigmoid: within each sequence, 1e-4 as in
    # DeepSeek-V3; softmax: over a forward pass, 1e-2 as in the Switch Transformer
    balance_loss_coef: Annotated[float, Field(ge=0)] | None = None
    z_loss_coef: Annotated[float, Field(ge=0)] = 0.0  # of mean(logsumexp(logits)^2); ST-MoE has 1e-3 (arXiv 2202.08906)


class ScheduleSection(Section):
    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup: Span = "2%"
    # wsd: the last part of the run, 20%; cosine and linear: from the warm-up on, all that remains
    decay: Span | None = None
    decay_shape: Literal["linear", "sqrt"] = "linear"  # of wsd; sqrt falls as 1 - sqrt (arXiv 2405.18392)
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the peak that the decay ends at
    batch_warmup: Span = "0%"  # the batch doubles from batch_start to train.batch_tokens over this part of the run
    batch_start: BatchTokens | None = None

    @property
    def decay_span(self) -> str | None:
        """The decay's length; None is all that remains after the warm-up. SmolLM2-135M decays over its last 20%."""
        return self.decay or ("20%" if self.name == "wsd" else None)

    @property
    def warms_batch_up(self) -> bool:
        return span_tokens(self.batch_warmup, 10**18) > 0

    def idle(self) -> dict[str, str]:
        keys = {"constant": ("decay", "decay_shape", "min_lr_ratio"), "wsd": ()}.get(self.name, ("decay_shape",))
        idle = dict.fromkeys(keys, f"with schedule.name={self.name}")
        return idle if self.warms_batch_up else idle | {"batch_start": "without schedule.batch_warmup"}

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.warms_batch_up and self.batch_start is None:
            found.append(("batch_start", f"is missing: batch_warmup {self.batch_warmup} needs a batch to begin with"))
        shares = [span_tokens(span, 10**6) for span in (self.warmup, self.decay or "0%") if span.endswith("%")]
        if sum(shares) > 10**6:
            found.append(("decay", f"warmup {self.warmup} and decay {self.decay} exceed the run"))
        return found


class EvalSection(Section):
    every: Tokens = 0  # training tokens between validations; 0: at the end only
    tokens: Annotated[Tokens, Field(ge=1)] = 256_000  # of the validation split, from its start
    prompts: list[str] = ["Hello, I am a language model,"]  # continued at each validation
    max_new_tokens: Annotated[int, Field(ge=1)] = 48
    tasks: list[str] = []  # lm-eval's tasks, scored during training
    tasks_every: Tokens = 0  # training tokens between scorings; 0: at the end only
    limit: Annotated[int, Field(ge=1)] | None = None  # documents a task; null scores all
    # With the tasks' data sets by their names on the Hub; null: $LIGHTLM_EVAL_DATA, or the Hub and its cache
    data_dir: Annotated[str, Field(min_length=1)] | None = None

    def problems(self) -> list[Problem]:
        idle = [key for key in ("tasks_every", "limit", "data_dir") if getattr(self, key) and not self.tasks]
        return [(key, "has no effect without eval.tasks; name some, or leave it out") for key in idle]


class CheckpointSection(Section):
    every: Tokens = 0  # training tokens between checkpoints; 0: at the end only
    keep_last: Annotated[int, Field(ge=1)] = 2  # with 1 there is none to fall back on if a disk damages it
    keep_every: Tokens = 0  # training tokens between checkpoints that are kept for good; 0: none
    asynchronous: bool = True  # write while training goes on, from a copy in memory of 12 bytes a parameter


class TrackingSection(Section):
    backends: list[Literal["tensorboard", "wandb", "trackio"]] = []  # besides metrics.jsonl
    project: Annotated[str, Field(pattern=NAME_PATTERN)] = "lightlm"  # of wandb and trackio

    def problems(self) -> list[Problem]:
        twice = sorted({name for name in self.backends if self.backends.count(name) > 1})
        return [("backends", f"names {name} twice") for name in twice]


class Recipe(BaseModel):
    """A whole run: what `lightlm train` needs to know."""

    # protected_namespaces: pydantic reserves `model_` names, and the contract has a section `model`.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(pattern=NAME_PATTERN)
    model: ModelConfig
    data: DataSection
    train: TrainSection
    optimizer: AnyOptimizer
    moe: MoESection = MoESection()
    schedule: ScheduleSection = ScheduleSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def seq_len(self) -> int:
        return self.train.seq_len or self.model.max_seq_len

    @property
    def batch_sequences(self) -> int:
        """Sequences in a global batch."""
        return self.train.batch_tokens // self.seq_len

    @property
    def router_training(self) -> MoESection:
        """`moe` with the defaults of the router's kind written out."""
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

    def _moe_problems(self) -> list[Problem]:
        moe = self.moe
        given = [key for key, value in moe if key in moe.model_fields_set and value is not None]
        if not self.model.num_experts:
            return [(f"moe.{key}", "has no effect without model.num_experts; leave it out") for key in given]
        if self.model.router == "softmax" and "bias_update_rate" in given:
            return [("moe.bias_update_rate", "has no effect with model.router=softmax; leave it out")]
        return []

    def problems(self) -> list[Problem]:
        """What does not fit between sections."""
        optimizer = self.optimizer.model_problems(tied=self.model.tie_embeddings)
        found = [(f"optimizer.{key}", message) for key, message in optimizer] + self._moe_problems()
        schedule = self.schedule
        warmup, decay = (span_tokens(s or "0%", self.train.tokens) for s in (schedule.warmup, schedule.decay_span))
        if warmup + decay > self.train.tokens:
            spans = f"warmup {schedule.warmup}" + (f" and decay {schedule.decay_span}" if decay else "")
            found.append(("schedule", f"{spans} exceed the run's {self.train.tokens:,} tokens"))
        if self.seq_len > self.model.max_seq_len:
            found.append(("train.seq_len", f"{self.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}"))
        elif self.train.batch_tokens % self.seq_len:
            nearest = max(round(self.train.batch_tokens / self.seq_len), 1) * self.seq_len
            message = (
                f"{self.train.batch_tokens} is no whole number of {self.seq_len}-token sequences; nearest: {nearest}"
            )
            found.append(("train.batch_tokens", message))
        elif self.train.micro_batch_size != "auto" and self.batch_sequences % self.train.micro_batch_size:
            found.append(
                (
                    "train.micro_batch_size",
                    f"{self.train.micro_batch_size} does not divide the {self.batch_sequences} sequences of a batch",
                )
            )
        return found + self._batch_warmup_problems()

    def _batch_warmup_problems(self) -> list[Problem]:
        schedule, full = self.schedule, self.train.batch_tokens
        start = schedule.batch_start
        if start is None or not schedule.warms_batch_up or full % self.seq_len:
            return []
        found = []
        if span_tokens(schedule.batch_warmup, self.train.tokens) > self.train.tokens:
            message = f"{schedule.batch_warmup} exceeds the run's {self.train.tokens:,} tokens"
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
