"""Check a recipe and report all mistakes at once: each with its key, its line or override, the allowed values and the
nearest valid key.
"""

import difflib
import re
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from lightlm.errors import RecipeError
from lightlm.model.config import ModelConfig
from lightlm.names import nearest
from lightlm.optim.registry import DEFAULT, OPTIMIZERS
from lightlm.optim.section import NO_EFFECT, Problem
from lightlm.recipe.renamed import ELSEWHERE, RENAMED
from lightlm.recipe.schema import Recipe
from lightlm.recipe.sections.data import Stage
from lightlm.recipe.sections.distill import DistillSection
from lightlm.recipe.sections.section import EARLIER_RUN
from lightlm.recipe.sections.train import MTPSection

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_NO_SECTION = ("model_type", "model_attributes_type", "dataclass_type", "dict_type")
_LEAVE_OUT = "; leave it out"
_NESTED = (("data", "mix"), ("data", "stages"), ("train", "distill"), ("train", "mtp"))  # have keys of their own


class IdleSettingsError(RecipeError):
    """The only mistakes of a recipe are settings without effect: `idle` maps each dotted key to the reason."""

    def __init__(self, message: str, idle: dict[str, str]) -> None:
        super().__init__(message)
        self.idle = idle


def parse_recipe(
    values: dict[str, Any], where: str, origins: dict[str, str] | None = None, *, earlier: bool = False
) -> Recipe:
    """Check plain values against the schema and return the recipe.

    Args:
        where: the file, for messages.
        origins: where each dotted key was given, such as `line 12`.
        earlier: the values are those of a run that exists, with which it must stay resumable.

    Raises:
        RecipeError: the values have mistakes; the message lists all of them.
    """
    # A section without keys is its defaults.
    values = {key: {} if value is None and key != "name" else value for key, value in values.items()}
    values = {key: _without_bools(key, value) for key, value in values.items()}
    try:
        return Recipe.model_validate(values, context={EARLIER_RUN: earlier})
    except ValidationError as error:
        entries = error.errors(include_url=False)
    # A union (`auto` or a number) fails once per member; these messages become one.
    messages: dict[str, list[str]] = {}
    for entry in entries:
        key, message = _describe(entry)
        section, _, inner = key.partition(".")
        if section == "optimizer" and entry["type"] in _UNKNOWN and inner in _types()[section]:
            name = values[section].get("name", DEFAULT)
            if name not in OPTIMIZERS:
                continue  # a setting of some optimizer, and which one is meant is the mistake
            message = f"{NO_EFFECT} with optimizer.name={name}{_LEAVE_OUT}"
        messages.setdefault(key, []).append(message)
    idle = {key: parts[0].removesuffix(_LEAVE_OUT) for key, parts in messages.items() if parts[0].startswith(NO_EFFECT)}
    lines = [f"  {key}: {'; or '.join(parts)}{place_of(key, origins or {})}" for key, parts in messages.items()]
    message = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''} in {where}:\n" + "\n".join(lines)
    raise IdleSettingsError(message, idle) if len(idle) == len(messages) else RecipeError(message)


def _without_bools(section: str, settings: Any) -> Any:
    """Return a section with `true` and `false` as text where they are not allowed: pydantic reads them as 1 and 0."""
    if not isinstance(settings, dict):
        return settings
    types = _types().get(section, {})
    settings = {
        key: _without_bools(f"{section}.{key}", value) if f"{section}.{key}" in _types() else value
        for key, value in settings.items()
    }
    return {
        key: str(value).lower() if isinstance(value, bool) and "bool" not in str(types.get(key)) else value
        for key, value in settings.items()
    }


def _types() -> dict[str, dict[str, Any]]:
    """Return the type of each key, by section; a top-level key without keys of its own has none."""
    found = {
        name: {key: inner.annotation for key, inner in getattr(field.annotation, "model_fields", {}).items()}
        for name, field in Recipe.model_fields.items()
    }
    found["train.distill"] = {key: inner.annotation for key, inner in DistillSection.model_fields.items()}
    found["train.mtp"] = {key: inner.annotation for key, inner in MTPSection.model_fields.items()}
    optimizers = (section.model_fields.items() for section in OPTIMIZERS.values())
    found["optimizer"] = {key: inner.annotation for items in optimizers for key, inner in items}
    return found | {"model": {field.name: field.type for field in fields(ModelConfig)}}


def _describe(entry: Any) -> Problem:
    """Return a pydantic error as (dotted key, message in plain words)."""
    # Below section and key, a location holds positions in lists and the type names of union members.
    location = entry["loc"]
    inner = [part for part in location[2:] if isinstance(part, int) or location[:2] in _NESTED]
    key = ".".join(str(part) for part in [*location[:2], *inner])
    if entry["type"] in _UNKNOWN:
        return key, _unknown(key)
    if entry["type"] in ("missing", "missing_argument"):
        return key, "is missing; or train.init_from names a model to start from" if key == "model" else "is missing"
    message = entry["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]
    if entry["type"] in _NO_SECTION:
        message = "should be a section with keys of its own"
    given = entry["input"]
    if isinstance(given, str | int | float | bool) and not message.startswith(str(given) or " "):
        message = f"{message}, not {given!r}"
    if entry["type"] == "literal_error":
        close = difflib.get_close_matches(str(given), re.findall(r"'(.*?)'", entry["ctx"]["expected"]), n=1)
        message += f"; did you mean {close[0]}?" if close else ""
    return key, message[0].lower() + message[1:]


def _unknown(key: str) -> str:
    if key in RENAMED:
        return f"renamed to {RENAMED[key]}"
    keys = {name: list(types) for name, types in _types().items()} | {"data.stages": list(Stage.model_fields)}
    section, _, name = key.rpartition(".")
    section = re.sub(r"\.\d+$", "", section)  # the number of a stage
    if name in ELSEWHERE:
        return f"unknown key; {ELSEWHERE[name]}"
    valid = keys.get(section, [known for known in keys if "." not in known])
    # A known name in the wrong section (train.lr) means that key. Spellings are compared without the section: with it,
    # any short name would resemble another of the same section.
    close = [f"{other}.{name}" for other, found in keys.items() if name in found]
    if not close and (near := nearest(name, valid)):
        close = [f"{section}.{near}".lstrip(".")]
    hint = f"did you mean {close[0]}?" if close else f"valid are {', '.join(valid)}"
    return f"unknown key; {hint}"


def place_of(key: str, origins: dict[str, str]) -> str:
    """Return where a dotted key was given, or else its section, as the end of a message; empty if neither was."""
    while key not in origins and "." in key:
        key = key.rpartition(".")[0]
    return f"  [{origins[key]}]" if key in origins else ""
