"""The reference of recipe keys, made from the schema: for `lightlm recipes keys`, for the site and for editors.

`python -m lightlm.recipe.reference` writes recipes/recipe.schema.json anew.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from lightlm.errors import UsageError
from lightlm.names import nearest
from lightlm.recipe.loading import recipes_folder
from lightlm.recipe.schema import Recipe

SCHEMA_FILE = "recipe.schema.json"
_TEXT_INIT = {"init_from": {"type": "string"}}
_LOWEST = {"minimum": "<=", "exclusiveMinimum": "<"}
_HIGHEST = {"maximum": "<=", "exclusiveMaximum": "<"}
Schema = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One recipe key. `allowed` is the type or the allowed values in words; `default` is as in YAML, or `required`."""

    key: str
    allowed: str
    default: str
    description: str


class _WithoutFieldTitles(GenerateJsonSchema):
    """Leaves out the titles that pydantic makes from field names; those of quantities stay."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> Schema:
    """Return the JSON Schema of a recipe file, which also admits quantities as text (`10B`, `2%`)."""
    schema = Recipe.model_json_schema(schema_generator=_WithoutFieldTitles)
    for definition in schema["$defs"].values():
        definition.pop("description", None)  # the docstring of a class is for programmers
        for entry in definition["properties"].values():
            entry["description"] = " ".join(entry["description"].split())  # a docstring may have several lines
    # A recipe that starts from a model takes the section `model`, or the rest of it, from there.
    shape = schema["$defs"]["ModelConfig"].pop("required")
    schema["required"].remove("model")
    starts = {"required": ["train"], "properties": {"train": {"required": ["init_from"], "properties": _TEXT_INIT}}}
    schema |= {"if": {"not": starts}, "then": {"required": ["model"], "properties": {"model": {"required": shape}}}}
    for entry in schema["properties"].values():
        if _variants(entry, schema):
            entry.pop("default", None)  # whole sections: their keys have defaults of their own
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "LightLM recipe"}


def sections() -> dict[str, str]:
    """Return the description of each top-level key of a recipe."""
    return {name: field.description or "" for name, field in Recipe.model_fields.items()}


def keys(section: str | None = None) -> list[Key]:
    """Return all keys of a recipe, or those of one section.

    Raises:
        UsageError: there is no such section.
    """
    found = list(_all_keys(json_schema()))
    chosen = [entry for entry in found if section is None or f"{entry.key}.".startswith(f"{section}.")]
    if not chosen:
        named = [entry.key for entry in found if entry.key.endswith(f".{section}")]
        close = named[0] if named else nearest(str(section), [*sections(), *(entry.key for entry in found)])
        hint = f"did you mean {close}?" if close else f"sections are {', '.join(sections())}"
        raise UsageError(f"a recipe has no section {section}; {hint}")
    return chosen


def _all_keys(schema: Schema) -> Iterator[Key]:
    for name, entry in schema["properties"].items():
        variants = _variants(entry, schema)
        if not variants:
            yield _key(name, [entry])
        for inner in dict.fromkeys(key for variant in variants for key in variant["properties"]):
            having = [variant["properties"] for variant in variants if inner in variant["properties"]]
            tag = " or ".join(_allowed(properties["name"]) for properties in having if len(having) < len(variants))
            yield _key(
                f"{name}.{inner}",
                [properties[inner] for properties in having],
                tag and f" Only with {name}.name={tag}.",
            )
            for nested in _variants(having[0][inner], schema):
                for key, nested_entry in nested["properties"].items():
                    yield _key(f"{name}.{inner}.{key}", [nested_entry])


def _variants(entry: Schema, schema: Schema) -> list[Schema]:
    """Return the object schemas of a section: one, or one for each member of a union; none for a plain value."""
    if "$ref" in entry:
        return _variants(schema["$defs"][entry["$ref"].rsplit("/", 1)[-1]], schema)
    if "properties" in entry:
        return [entry]
    return [found for member in entry.get("anyOf", ()) for found in _variants(member, schema)]


def _key(key: str, entries: list[Schema], only: str = "") -> Key:
    """Return a key with its schema in each member of a union."""
    values = [_allowed(entry) for entry in entries]
    meanings = {entry.get("description", ""): value for entry, value in zip(entries, values, strict=True)}
    description = next(iter(meanings)) if len(meanings) == 1 else " ".join(f"{v}: {m}" for m, v in meanings.items())
    default = entries[0].get("default", "required")
    text = default if isinstance(default, str) else json.dumps(default)
    return Key(key, " | ".join(dict.fromkeys(values)), text, description + only)


def _allowed(entry: Schema) -> str:
    """Return the type of a value, or the values allowed, in words."""
    if "$ref" in entry:
        return "section"
    if "title" in entry:
        return str(entry["title"])
    if "anyOf" in entry:
        return " | ".join(dict.fromkeys(_allowed(member) for member in entry["anyOf"]))
    if "const" in entry:
        return str(entry["const"])
    if "enum" in entry:
        return " | ".join(str(value) for value in entry["enum"])
    if entry["type"] == "array":
        if "items" in entry:
            return f"list of {_allowed(entry['items'])}"
        return f"[{', '.join(_allowed(item) for item in entry['prefixItems'])}]"
    word = {"string": "text", "boolean": "true | false"}.get(entry["type"], str(entry["type"]))
    low, high = ([(entry[b], s) for b, s in bounds.items() if b in entry] for bounds in (_LOWEST, _HIGHEST))
    if high:
        return f"{low[0][0]:g} {low[0][1]} {word} {high[0][1]} {high[0][0]:g}"
    return f"{word} {low[0][1].replace('<', '>')} {low[0][0]:g}" if low else word


def schema_text() -> str:
    """Return the text of the schema file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (recipes_folder() / SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
