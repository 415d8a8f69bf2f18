"""The section `model` of a recipe that starts from a model: taken from it, and not in contradiction to it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightlm.errors import RecipeError
from lightlm.model.config import ROPE_FIELDS, ModelConfig
from lightlm.recipe.mistakes import place_of

# Fields that a run may set anew: positions that rotate have no weights, so it can train on longer texts; `init_std` has
# no effect on weights that exist.
_FREE = ("max_seq_len", *ROPE_FIELDS, "init_std")


@dataclass(frozen=True)
class Start:
    """The model that `train.init_from` or `train.distill.teacher` names.

    Attributes:
        reference: names the same weights for good: a run's checkpoint rather than the run, which may train on.
        model: its shape, with every default filled in.
    """

    reference: str
    model: ModelConfig

    def complete(self, values: dict[str, Any], where: str, origins: dict[str, str]) -> dict[str, Any]:
        """Return a recipe's values with this reference, and with the keys of the section `model` that they leave out.

        Raises:
            RecipeError: keys of the section `model` contradict the model; the message lists all of them.
        """
        given = {} if values.get("model") is None else values["model"]
        if not isinstance(given, dict):
            return values  # the schema refuses it
        known = self.model.to_dict()
        wrong = [
            f"  model.{key}: {value!r}, but {known[key]!r} in the model{place_of(f'model.{key}', origins)}"
            for key, value in given.items()
            if key in known and not self._allows(key, value)
        ]
        if wrong:
            raise RecipeError(
                f"{where} contradicts the model that it starts from (train.init_from: {self.reference}):\n"
                + "\n".join(wrong)
                + "\nLeave the section `model` out of the recipe, or add model={} to the command: the shape comes from "
                "the model"
            )
        kept = {key: value for key, value in given.items() if key in _FREE or key not in known}
        # What only another kind of rotary scaling needs is not taken over.
        idle = replace(self.model, rope_scaling=kept.get("rope_scaling", self.model.rope_scaling)).idle()
        model = {key: value for key, value in known.items() if key not in idle} | kept
        if model.get("rope_scaling") == "llama3" and not model.get("rope_original_seq_len"):
            model["rope_original_seq_len"] = self.model.max_seq_len
        return values | {"model": model, "train": values["train"] | {"init_from": self.reference}}

    def _allows(self, key: str, value: Any) -> bool:
        """Return whether a value means the model's own (0 may stand for a default), or may differ from it."""
        if key in _FREE:
            return key != "max_seq_len" or self.model.position == "rope" or value == self.model.max_seq_len
        own = getattr(self.model, key)
        if isinstance(own, float) and isinstance(value, int | float):  # a config.json may have rounded it to float32
            return math.isclose(value, own, rel_tol=1e-6)
        if key == "vocab_size" and value == 0:
            return True
        try:
            return replace(self.model, **{key: value}).resolved() == self.model
        except (TypeError, ValueError):
            return False


FindStart = Callable[[str, str], Start]
"""Finds the model of a reference, which a key of a recipe gives: (reference, key)."""
