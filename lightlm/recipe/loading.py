"""Read recipes from files, and apply overrides such as `optimizer.lr=1e-3`."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import lightlm
from lightlm.errors import RecipeError, UsageError
from lightlm.recipe.mistakes import parse_recipe
from lightlm.recipe.renamed import with_new_names
from lightlm.recipe.schema import Recipe

# Keys whose values are text even if they look like something else: a folder may be called 2024 or [old].
_TEXT_KEYS = ("name", "data.dataset", "train.device", "tracking.project")


def load_recipe(reference: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its path or by the name of a shipped one, and apply `key=value` overrides.

    Raises:
        RecipeError: the recipe does not exist, or has mistakes; the message lists all of them.
        UsageError: an override does not have the form key=value.
    """
    return _load(find_recipe(reference), overrides, lambda values: values)


def load_run_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the `recipe.yaml` of a run folder, which an earlier version may have written, and apply overrides.

    Raises:
        RecipeError, UsageError: as `load_recipe`.
    """
    return _load(run / "recipe.yaml", overrides, with_new_names)


def _load(path: Path, overrides: Sequence[str], prepare: Callable[[dict[str, Any]], dict[str, Any]]) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path} must hold the sections of a recipe ({', '.join(Recipe.model_fields)})")
    values = prepare(values)
    origins = dict(_key_lines(yaml.compose(text)))
    for override in overrides:
        key = _apply_override(values, override)
        origins[key] = f"override {override}"
    return parse_recipe(values, str(path), origins)


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set the dotted key of `key=value` in nested `values`, reading the value as YAML, and return the key."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UsageError(f"'{override}' is not an override; write key=value, for example optimizer.lr=1e-3")
    try:
        value = text if ".".join(parts) in _TEXT_KEYS else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"the value of '{override}' is not valid YAML: {error}") from None
    section = values
    for part in parts[:-1]:
        child = section.setdefault(part, {})
        if not isinstance(child, dict):
            raise UsageError(f"'{override}': {part} is a value, not a section")
        section = child
    section[parts[-1]] = value
    return ".".join(parts)


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in an installed wheel, or beside the package in a checkout."""
    package = Path(lightlm.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[Path]:
    """Return the files of the shipped recipes, sorted by name."""
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(reference: str | Path) -> Path:
    """Return the file at this path, or the shipped recipe of this name (`demo`, `demo.yaml`, `recipes/demo.yaml`).

    Raises:
        RecipeError: neither exists.
    """
    path = Path(reference)
    if path.is_file():
        return path
    shipped = {recipe.stem: recipe for recipe in shipped_recipes()}
    if path.parent in (Path("."), Path("recipes")) and path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    close = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise RecipeError(f"no recipe at {path}: no such file, and LightLM ships {', '.join(shipped)}; {hint}".rstrip("; "))


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            yield path, f"line {key.start_mark.line + 1}"
            yield from _key_lines(value, f"{path}.")
