"""The section `tracking`: experiment trackers."""

from typing import Literal

from pydantic import Field

from lightlm.recipe.sections.section import NAME_PATTERN, Section


class TrackingSection(Section):
    backends: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Trackers that receive the metrics besides metrics.jsonl (extra `[tracking]`)."""
    project: str = Field(default="lightlm", pattern=NAME_PATTERN)
    """Project name for wandb and trackio."""

    def idle(self) -> dict[str, str]:
        with_project = set(self.backends) & {"wandb", "trackio"}
        return {} if with_project else {"project": "without wandb or trackio in tracking.backends"}
