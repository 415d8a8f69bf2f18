"""The optimizers that a recipe can name. A new one is a file with its section, and its line in `OPTIMIZERS`."""

import functools
import operator
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, field_validator
from pydantic_core import PydanticKnownError

from lightlm.optim.adamw import AdamWSection
from lightlm.optim.muon import MuonSection
from lightlm.optim.normuon import NorMuonSection
from lightlm.optim.section import OptimizerSection

OPTIMIZERS: dict[str, type[OptimizerSection]] = {
    "adamw": AdamWSection,
    "muon": MuonSection,
    "normuon": NorMuonSection,
}
DEFAULT = "adamw"


class _UnknownOptimizer(OptimizerSection):
    """A section with a wrong name: checking the shared settings too shows all mistakes at once."""

    @field_validator("name", mode="before")
    @classmethod
    def _refuse(cls, name: Any) -> None:
        *others, last = map(repr, OPTIMIZERS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})


def read_section(values: Any) -> OptimizerSection:
    """Return the section of the optimizer that `values["name"]` names, or of AdamW if there is no name.

    Raises:
        pydantic.ValidationError: listing every mistake.
    """
    if isinstance(values, OptimizerSection):
        return values
    name = values.get("name", DEFAULT) if isinstance(values, dict) else DEFAULT
    return OPTIMIZERS.get(str(name), _UnknownOptimizer).model_validate(values)


# The type of a field that holds any optimizer's section: a union that `name` decides. Validation reads the registry,
# so that it includes optimizers that a program adds; the JSON Schema includes those above.
_UNION: Any = functools.reduce(operator.or_, OPTIMIZERS.values())
AnyOptimizer = Annotated[SerializeAsAny[OptimizerSection], BeforeValidator(read_section, json_schema_input_type=_UNION)]
