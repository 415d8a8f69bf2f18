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
from lightlm.optim.registry import DEFAULT, OPTIMIZERS
from lightlm.recipe.renamed import RENAMED
from lightlm.recipe.schema import Problem, Recipe

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def parse_recipe(values: dict[str, Any], where: str, origins: dict[str, str] | None = None) -> Recipe:
    """Check plain values against the schema and return the recipe.

    Args:
        where: the file, for messages.
        origins: where each dotted key was given, such as `line 12`.

    Raises:
        RecipeError: the values have mistakes; the message lists all of them.
    """
    values = {key: {} if value is None else value for key, value in values.items()}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        entries = error.errors(include_url=False)
    # A union (`auto` or a number) fails once per member; these messages become one.
    messages: dict[str, list[str]] = {}
    for entry in entries:
        key, message = _describe(entry)
        section, _, inner = key.partition(".")
        if section == "optimizer" and entry["type"] in _UNKNOWN and inner in _optimizer_keys():
            name = values[section].get("name", DEFAULT)
            if name not in OPTIMIZERS:
                continue  # a setting of some optimizer, and which one is meant is the mistake
            message = f"has no effect with optimizer.name={name}; leave it out"
        messages.setdefault(key, []).append(message)
    lines = [f"  {key}: {'; or '.join(parts)}{_place(key, origins or {})}" for key, parts in messages.items()]
    raise RecipeError(f"{len(lines)} mistake{'s' if len(lines) > 1 else ''} in {where}:\n" + "\n".join(lines))


def _describe(entry: Any) -> Problem:
    """Return a pydantic error as (dotted key, message in plain words)."""
    # Below section and key, a location holds positions in lists and the type names of union members.
    location = entry["loc"]
    key = ".".join(str(part) for part in [*location[:2], *(part for part in location[2:] if isinstance(part, int))])
    if entry["type"] in _UNKNOWN:
        return key, _unknown(key)
    if entry["type"] in ("missing", "missing_argument"):
        return key, "is missing"
    message = entry["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]
    given = entry["input"]
    if isinstance(given, str | int | float | bool):
        message = f"{message}, not {given!r}"
    if entry["type"] == "literal_error":
        close = difflib.get_close_matches(str(given), re.findall(r"'(.*?)'", entry["ctx"]["expected"]), n=1)
        message += f"; did you mean {close[0]}?" if close else ""
    return key, message[0].lower() + message[1:]


def _unknown(key: str) -> str:
    if key in RENAMED:
        return f"renamed to {RENAMED[key]}"
    keys = {name: list(getattr(field.annotation, "model_fields", ())) for name, field in Recipe.model_fields.items()}
    keys |= {"model": [field.name for field in fields(ModelConfig)], "optimizer": _optimizer_keys()}
    section, _, name = key.rpartition(".")
    valid = keys.get(section, list(keys))
    # A known name in the wrong section (train.lr) means that key. Spellings are compared without the section: with it,
    # any short name would resemble another of the same section.
    close = [f"{other}.{name}" for other, found in keys.items() if name in found] or [
        f"{section}.{other}".lstrip(".") for other in difflib.get_close_matches(name, valid, n=1)
    ]
    hint = f"did you mean {close[0]}?" if close else f"valid are {', '.join(valid)}"
    return f"unknown key; {hint}"


def _optimizer_keys() -> list[str]:
    return list(dict.fromkeys(key for section in OPTIMIZERS.values() for key in section.model_fields))


def _place(key: str, origins: dict[str, str]) -> str:
    """Return where a key was given, or else its section."""
    while key not in origins and "." in key:
        key = key.rpartition(".")[0]
    return f"  [{origins[key]}]" if key in origins else ""
