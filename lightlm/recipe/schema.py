"""The schema of a recipe: its sections, and combinations of their settings that are refused."""

from collections.abc import Mapping
from typing import Any, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from lightlm.model.config import ModelConfig
from lightlm.optim.registry import AnyOptimizer
from lightlm.optim.section import NO_EFFECT, Problem
from lightlm.quantities.types import span_tokens
from lightlm.recipe.sections.checkpoint import CheckpointSection
from lightlm.recipe.sections.data import DataSection
from lightlm.recipe.sections.evaluation import EvalSection
from lightlm.recipe.sections.moe import MoESection
from lightlm.recipe.sections.schedule import ScheduleSection
from lightlm.recipe.sections.section import NAME_PATTERN, is_earlier, refuse
from lightlm.recipe.sections.tracking import TrackingSection
from lightlm.recipe.sections.train import TrainSection


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
        refuse(found, info)
        return section

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""
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
        schedule, batch, tokens = self.schedule, self.train.batch_tokens, self.train.tokens
        optimizer += self.optimizer.run_problems(decays=schedule.decays, tokens=tokens)
        found = [(f"optimizer.{key}", message) for key, message in optimizer] + self._moe_problems()
        if self.optimizer.multiplier_weight_decay and self.model.multipliers == "none":
            found.append(("optimizer.multiplier_weight_decay", f"{NO_EFFECT} without model.multipliers; leave it out"))
        if schedule.weight_decay != "constant" and not self.optimizer.decays:
            found.append(("schedule.weight_decay", f"{NO_EFFECT} without optimizer.weight_decay; leave it out"))
        found += [(f"schedule.{key}", message) for key, message in schedule.decay_point_problems(tokens)]
        if not self.eval.every:  # the one validation, at the end, has no other to compare with
            idle = f"{NO_EFFECT} without eval.every; leave it out"
            given = {"train.patience": self.train.patience, "checkpoint.keep_best": self.checkpoint.keep_best}
            found += [(key, idle) for key, value in given.items() if value]
        spans = schedule.span_problems(tokens)
        found += [(f"schedule.{key}", message) for key, message in spans]
        found += [(f"data.{key}", message) for key, message in self.data.span_problems(tokens)]
        if not spans and not is_earlier(info) and (end := schedule.idle_end(tokens)):
            rest = f"{schedule.decay} of {schedule.name} leaves the last {1 - end / tokens:.0%} of the run at rate 0"
            found.append(("schedule.decay", f"{rest}; leave it out to fill the run, or set schedule.min_lr_ratio"))
        mtp = self.train.mtp
        if mtp.depth and span_tokens(mtp.anneal, tokens) > tokens:
            found.append(("train.mtp.anneal", f"{mtp.anneal} exceeds the run's {tokens:,} tokens; write a share: 66%"))
        if mtp.depth >= self.seq_len:
            found.append(("train.mtp.depth", f"must be below the {self.seq_len} tokens of a sequence, is {mtp.depth}"))
        if self.seq_len > self.model.max_seq_len:
            found.append(("train.seq_len", f"{self.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}"))
        elif batch % self.seq_len:
            nearest = max(round(batch / self.seq_len), 1) * self.seq_len
            message = f"{batch} is not a whole number of {self.seq_len}-token sequences; nearest: {nearest}"
            found.append(("train.batch_tokens", message))
        elif self.train.micro_batch_size != "auto" and self.batch_sequences % self.train.micro_batch_size:
            message = f"{self.train.micro_batch_size} does not divide the {self.batch_sequences} sequences of a batch"
            found.append(("train.micro_batch_size", message))
        refuse(found + self._batch_warmup_problems(), info)
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
        """Return the values as JSON and YAML write them, by section; keys without effect are left out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def by_dotted_key(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Recipe.to_dict` returns by `section.key`; a section in a section stays a dict."""
    found: dict[str, Any] = {}
    for section, values in sections.items():
        inner = {f"{section}.{key}": value for key, value in values.items()} if isinstance(values, dict) else None
        found |= {section: values} if inner is None else inner
    return found
