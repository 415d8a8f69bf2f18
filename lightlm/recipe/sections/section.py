"""What all sections of a recipe share: settings without effect, and how problems are reported."""

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from lightlm.optim.section import NO_EFFECT, Problem

EARLIER_RUN = "earlier_run"  # in a validation's context: the recipe is that of a run, which must stay resumable
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of recipes and runs: a plain folder name on every system


def refuse(problems: list[Problem], info: ValidationInfo) -> None:
    """Raise the ValidationError that lists these problems, if there are any.

    The recipe of a run may hold settings without effect: earlier versions did not refuse all of them.
    """
    errors: list[InitErrorDetails] = [
        {"type": PydanticCustomError("problem", "{text}", {"text": text}), "loc": tuple(key.split(".")), "input": None}
        for key, text in problems
        if not (text.startswith(NO_EFFECT) and is_earlier(info))
    ]
    if errors:
        raise ValidationError.from_exception_data("Recipe", errors)


def is_earlier(info: ValidationInfo) -> bool:
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
