"""The part of a recipe's section `optimizer` shared by all optimizers, and what each optimizer adds."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Problem = tuple[str, str]  # key, message
NO_EFFECT = "has no effect"  # begins the message of a setting that could as well be left out


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
    scalar_lr: Rate | None = Field(default=None, description="Peak rate of norms and biases. null takes lr.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay of everything but norms and biases (0.1 as in GPT-3)."
    )
    embedding_weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Weight decay of the tables and the head. null takes weight_decay."
    )

    def build(self, groups: list[dict[str, Any]], dtype: "torch.dtype") -> "torch.optim.Optimizer":
        """Return the optimizer. Import torch inside this method: reading a recipe must not load it.

        Args:
            groups: of `groups.parameter_groups`; each holds its `lr` and `weight_decay`.
            dtype: precision of the training's matrix products.
        """
        raise NotImplementedError

    def state_bytes(self, group: str) -> int:
        """Return the bytes that the optimizer keeps per parameter of a group, such as `matrices`."""
        raise NotImplementedError

    def problems(self) -> list[Problem]:
        """Return the settings that do not fit together."""
        return []

    def model_problems(self, *, tied: bool) -> list[Problem]:
        """Return the settings that do not fit the model; `tied`: its head is the token table."""
        if tied and self.head_lr is not None:
            return [("head_lr", f"{NO_EFFECT} with model.tie_embeddings; embedding_lr is the rate of the shared table")]
        return []
