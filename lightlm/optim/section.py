"""The part of a recipe's section `optimizer` shared by all optimizers, and what each optimizer adds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Problem = tuple[str, str]  # key, message
Shape = tuple[int, ...]
MATRICES = "matrices"  # the parameter group of the blocks' matrices; see groups.py for the others
NO_EFFECT = "has no effect"  # begins the message of a setting that could as well be left out


@dataclass(frozen=True)
class StepSettings:
    """What the schedules say about one step.

    Attributes:
        lr: share of each group's peak learning rate.
        weight_decay: share of each group's weight decay.
        momentum: of the matrices; None does not change it.
        batch_tokens: size of the step's batch.
    """

    lr: float
    weight_decay: float
    momentum: float | None
    batch_tokens: int


class OptimizerSection(BaseModel):
    """Settings of an optimizer.

    A new optimizer is one file with a subclass, which names itself (`name: Literal["lion"] = "lion"`), adds its
    settings and implements `build` and `state_bytes`; `registry.OPTIMIZERS` lists it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    lr: Rate = Field(
        description="Peak learning rate of the matrices in the blocks, and of every group without a rate of its own."
    )
    embedding_lr: Rate | None = Field(
        default=None, description="Peak rate of the token and position tables, and of a tied head. null takes lr."
    )
    head_lr: Rate | None = Field(default=None, description="Peak rate of an untied output head. null takes lr.")
    scalar_lr: Rate | None = Field(
        default=None, description="Peak rate of norms, biases, multipliers and residual scales. null takes lr."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay of matrices, tables and head (0.1 as in GPT-3)."
    )
    embedding_weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Weight decay of the tables and the head. null takes weight_decay."
    )
    multiplier_weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Weight decay of model.multipliers. A little keeps pairs with equal effect, such as the rows of "
        "up_proj and the columns of down_proj, from drifting apart (arXiv 2601.04890).",
    )

    def build(self, groups: list[dict[str, Any]], dtype: "torch.dtype") -> "torch.optim.Optimizer":
        """Return the optimizer. Import torch inside this method: reading a recipe must not load it.

        Args:
            groups: of `groups.parameter_groups`; each holds its `lr` and `weight_decay`.
            dtype: precision of the training's matrix products.
        """
        raise NotImplementedError

    def state_bytes(self, group: str, shape: Shape) -> int:
        """Return the bytes that the optimizer keeps of one tensor of a group, such as `matrices`."""
        raise NotImplementedError

    def momentum_at(self, tokens: float, total: int, decayed: float) -> float | None:
        """Return the momentum at `tokens` of `total`, or None if it does not change within a run.

        Args:
            decayed: share of the learning rate's decay that is over.
        """
        return None

    def momentum_corners(self, total: int) -> list[int]:
        """Return the tokens at which the momentum changes its course, beside the ends of the learning rate's decay."""
        return []

    @property
    def decays(self) -> bool:
        """Whether any group has weight decay."""
        return bool(self.weight_decay or self.embedding_weight_decay or self.multiplier_weight_decay)

    def problems(self) -> list[Problem]:
        """Return the settings that do not fit together."""
        return []

    def run_problems(self, *, decays: bool, tokens: int) -> list[Problem]:
        """Return the settings that do not fit a run of `tokens` tokens; `decays`: its learning rate has a decay."""
        return []

    def model_problems(self, *, tied: bool) -> list[Problem]:
        """Return the settings that do not fit the model; `tied`: its head is the token table."""
        if tied and self.head_lr is not None:
            return [("head_lr", f"{NO_EFFECT} with model.tie_embeddings; embedding_lr is the rate of the shared table")]
        return []
