"""Check a recipe and report all mistakes at once: each with its key, its line or override, the allowed values and the
nearest valid key.
"""

import difflib
import re
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lightlm.errors import RecipeError
from lightlm.model.config import ModelConfig
from lightlm.optim.registry import DEFAULT, OPTIMIZERS
from lightlm.optim.section import OptimizerSection
from lightlm.recipe.renamed import RENAMED
from lightlm.recipe.schema import Problem, Recipe, Section


def parse_recipe(values: dict[str, Any], where: str, origins: dict[str, str] | None = None) -> Recipe:
    """Check plain values against the schema and return the recipe.

    Args:
        where: the file, for messages.
        origins: where each dotted key was given, such as `line 12`.

    Raises:
        RecipeError: the values have mistakes; the message lists all of them.
    """
    problems: list[Problem] = []
    for name, field in Recipe.model_fields.items():
        if name in values:
            problems += _section_problems(name, field.rebuild_annotation(), values[name])
        elif field.is_required():
            problems.append((name, "is missing"))
    problems += [(key, _unknown(key)) for key in values if key not in Recipe.model_fields]
    if not problems:
        recipe = Recipe(**values)
        problems = recipe.problems()
    if problems:
        lines = []
        for key, message in problems:
            place = _origin(key, origins or {})
            lines.append(f"  {key}: {message}" + (f"  [{place}]" if place else ""))
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        raise RecipeError(f"{count} in {where}:\n" + "\n".join(lines))
    return recipe


def _section_problems(name: str, annotation: Any, value: Any) -> list[Problem]:
    """Return the mistakes within one top-level key."""
    if value is None:
        value = {}
    try:
        section = TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        # A union (`auto` or a number) fails once per member; these messages become one.
        messages: dict[str, list[str]] = {}
        for entry in error.errors(include_url=False):
            key, message = _describe(name, entry)
            if name == "optimizer" and key in _valid_keys() and message.startswith("unknown key"):
                optimizer = str(value.get("name", DEFAULT))
                if optimizer not in OPTIMIZERS:
                    continue  # a setting of some optimizer, and which one is meant is the mistake
                message = f"has no effect with optimizer.name={optimizer}; leave it out"
            messages.setdefault(key, []).append(message)
        return [(key, "; or ".join(parts)) for key, parts in messages.items()]
    inner = section.problems() if isinstance(section, Section | ModelConfig | OptimizerSection) else []
    return [(f"{name}.{key}", message) for key, message in inner]


def _describe(section: str, entry: Any) -> Problem:
    """Return a pydantic error as (dotted key, message in plain words)."""
    # Union members appear in the location as type names; only field names and list positions are keys.
    parts = [str(part) for part in entry["loc"]]
    known = set(_valid_keys())
    key = section
    for part in parts:
        if (
            f"{key}.{part}" in known
            or part.isdigit()
            or entry["type"].endswith(("extra_forbidden", "unexpected_keyword_argument"))
        ):
            key = f"{key}.{part}"
    if entry["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
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
    valid = _valid_keys()
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    # A known name in the wrong section (train.lr) means that key, although its spelling differs more.
    name = key.rsplit(".", 1)[-1]
    close = [other for other in valid if other.rsplit(".", 1)[-1] == name][:1] or close
    return "unknown key" + (f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(_siblings(key))}")


def _siblings(key: str) -> list[str]:
    section = key.rpartition(".")[0]
    return [other for other in _valid_keys() if other.rpartition(".")[0] == section]


def _valid_keys() -> list[str]:
    keys = []
    for name, field in Recipe.model_fields.items():
        keys.append(name)
        if field.annotation is ModelConfig:
            keys += [f"{name}.{entry.name}" for entry in fields(ModelConfig)]
        elif field.annotation is OptimizerSection:
            keys += dict.fromkeys(f"{name}.{inner}" for kind in OPTIMIZERS.values() for inner in kind.model_fields)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    return keys


def _origin(key: str, origins: dict[str, str]) -> str | None:
    """Return where a key was given, or else its section."""
    while key not in origins and "." in key:
        key = key.rpartition(".")[0]
    return origins.get(key)
