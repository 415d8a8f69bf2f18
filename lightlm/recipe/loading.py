"""Read recipes from files, and apply overrides such as `optimizer.lr=1e-3`."""

import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightlm
from lightlm.errors import RecipeError, UsageError
from lightlm.names import nearest, note_clash, warn
from lightlm.recipe.mistakes import IdleSettingsError, parse_recipe
from lightlm.recipe.renamed import with_new_names
from lightlm.recipe.schema import Recipe
from lightlm.recipe.sections.data import SOURCES
from lightlm.recipe.sections.distill import STORED
from lightlm.recipe.sections.section import NAME_PATTERN
from lightlm.recipe.start import FindStart
from lightlm.recipe.yaml_text import read_sections, read_value

Note = Callable[[str], None]


def load_recipe(
    reference: str | Path, overrides: Sequence[str] = (), note: Note = warn, find_start: FindStart | None = None
) -> Recipe:
    """Read a recipe by its path or by the name of a shipped one, and apply `key=value` overrides.

    Settings of the file that lose their effect by an override are left out, and of two overrides of one key the last
    one counts; `note` receives a message for each.

    Args:
        find_start: finds the models that the recipe names (`lightlm.convert.load.find_start`). The shape of that of
            `train.init_from` becomes the section `model`; without it, the recipe must have that section itself.

    Raises:
        RecipeError: the recipe does not exist, or has mistakes; the message lists all of them.
        UsageError: an override does not have the form key=value.
    """
    return _load(find_recipe(reference, note), overrides, note, find_start, earlier=False)


def recipe_name(reference: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return the name of a recipe, without looking for the model that it starts from.

    Raises:
        RecipeError, UsageError: as `load_recipe`, but other mistakes than in the name go unnoticed.
    """
    path = find_recipe(reference, lambda _: None)
    values, origins, _ = _overridden(path, overrides, lambda _: None)
    name = values.get("name")
    if not isinstance(name, str) or not re.match(NAME_PATTERN, name):
        parse_recipe(values, str(path), origins)
    return str(name)


def load_run_recipe(run: Path, overrides: Sequence[str] = (), note: Note = warn) -> Recipe:
    """Read the `recipe.yaml` of a run folder, which an earlier version may have written, and apply overrides.

    Settings without effect, and schedules whose rate ends at 0 early, are not refused: the run has them already.

    Raises:
        RecipeError, UsageError: as `load_recipe`.
    """
    path = run / "recipe.yaml"
    recipe = _load(path, overrides, note, None, earlier=True)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if "schedule.rewarmup" not in keys or "schedule.rewarmup_from" in keys:
        return recipe
    # A second re-warmup begins anew, but not where a restarted job gives the same overrides again.
    before, schedule = _load(path, (), note, None, earlier=True), recipe.schedule
    if (before.train.tokens, before.schedule.rewarmup) == (recipe.train.tokens, schedule.rewarmup):
        return recipe
    return recipe.model_copy(update={"schedule": schedule.model_copy(update={"rewarmup_from": None})})


def _load(path: Path, overrides: Sequence[str], note: Note, find_start: FindStart | None, *, earlier: bool) -> Recipe:
    values, origins, given = _overridden(path, overrides, note, earlier=earlier)
    if find_start is not None:
        values = _with_models(values, find_start, str(path), origins)
    while True:
        try:
            return parse_recipe(values, str(path), origins, earlier=earlier)
        except IdleSettingsError as error:
            if not given or any(f"{key}.".startswith(f"{other}.") for key in error.idle for other in given):
                raise
            for key, reason in error.idle.items():
                *outer, name = key.split(".")
                section = functools.reduce(operator.getitem, outer, values)
                note(f"{key} {section.pop(name)} of {path} {reason}, and is left out")


def _with_models(values: dict[str, Any], find_start: FindStart, where: str, origins: dict[str, str]) -> dict[str, Any]:
    """Return a recipe's values with the models that it names: their references for good, and the shape of its start."""
    reference, distill = _lookup(values, "train.init_from"), _lookup(values, "train.distill")
    if isinstance(reference, str) and reference:
        values = find_start(reference, "train.init_from").complete(values, where, origins)
    teacher = distill.get("teacher") if isinstance(distill, dict) else None
    if isinstance(distill, dict) and isinstance(teacher, str) and teacher not in ("", STORED):
        fixed = {"teacher": find_start(teacher, "train.distill.teacher").reference}
        values = values | {"train": values["train"] | {"distill": distill | fixed}}
    return values


def _overridden(
    path: Path, overrides: Sequence[str], note: Note, *, earlier: bool = False
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return a recipe's values with the overrides applied, where each key was given, and the overrides by key."""
    values, origins = read_sections(path)
    if earlier:
        values = with_new_names(values)
    inherited = _lookup(values, "schedule.name") or "wsd"
    given: dict[str, str] = {}
    for override in overrides:
        key = _apply_override(values, override)
        for other in [other for other in given if f"{other}.".startswith(f"{key}.")]:
            note(f"'{given.pop(other)}' has no effect: '{override}' comes later")
        given[key] = override
        origins[key] = f"override {override}"
    _keep_one_source(values.get("data"), given, path, note)
    # The length of the decay belongs to the shape that it was written for: 20% is the end of wsd, but the beginning of
    # cosine, which would leave most of the run at a rate of 0.
    chosen, decay = _lookup(values, "schedule.name"), _lookup(values, "schedule.decay")
    if "schedule.name" in given and chosen != inherited and "schedule.decay" not in given and decay is not None:
        del values["schedule"]["decay"]
        note(f"schedule.decay {decay} of {path} is that of {inherited}, and is left out with schedule.name={chosen}")
    return values, origins, given


def _keep_one_source(data: Any, given: dict[str, str], path: Path, note: Note) -> None:
    """Leave out what the file's section `data` trains on, if an override names something by another of its keys."""
    chosen = {key.split(".")[1]: text for key, text in given.items() if key.startswith("data.")}
    overridden = [key for key in SOURCES if key in chosen]
    if not overridden or not isinstance(data, dict):
        return
    for key in SOURCES:
        if key not in chosen and data.pop(key, None) is not None:
            note(f"data.{key} of {path} is left out: '{chosen[overridden[0]]}' replaces it")


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set the dotted key of `key=value` in nested `values`, reading the value as YAML, and return the key."""
    key, separator, text = override.partition("=")
    outer, mix, name = key.strip().partition(".mix.")
    parts = [*outer.split("."), *(["mix", name] if mix else [])]  # a folder's name may have dots
    if not separator or not all(parts):
        raise UsageError(f"'{override}' is not an override; write key=value, for example optimizer.lr=1e-3")
    value = read_value(".".join(parts), text)
    section: Any = values
    for part, following in itertools.pairwise(parts):
        place: Any = int(part) if isinstance(section, list) else part
        child = section[place] if isinstance(section, list) else section.get(place)
        if isinstance(child, list):
            if not following.isdecimal() or int(following) >= len(child):
                raise UsageError(f"'{override}': {part} is a list; its entries are {part}.0 to {part}.{len(child) - 1}")
        elif not isinstance(child, dict | None):
            raise UsageError(f"'{override}': {part} is a value, not a section")
        # A copy: with an alias in YAML, two sections are one object.
        section[place] = list(child) if isinstance(child, list) else dict(child or {})
        section = section[place]
    section[int(parts[-1]) if isinstance(section, list) else parts[-1]] = value
    return ".".join(parts)


def _lookup(values: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    inner = values.get(section)
    return inner.get(name) if isinstance(inner, dict) else None


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in an installed wheel, or beside the package in a checkout."""
    package = Path(lightlm.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[Path]:
    """Return the files of the shipped recipes, sorted by name."""
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(reference: str | Path, note: Note = warn) -> Path:
    """Return the shipped recipe of this name (`demo`), or the file at this path.

    `demo.yaml` and `recipes/demo.yaml` are paths, and mean the shipped recipe where there is no such file.

    Raises:
        RecipeError: neither exists.
    """
    path = Path(reference)
    shipped = {recipe.stem: recipe for recipe in shipped_recipes()}
    if str(reference) in shipped:
        mine: Iterable[Path] = (entry for entry in (path, path.with_name(f"{path.name}.yaml")) if entry.is_file())
        note_clash(str(reference), "the recipe that LightLM ships", mine, note)
        return shipped[str(reference)]
    if path.is_file():
        return path
    if path.is_dir():
        run = f"; it is a run: resume it with `lightlm train --resume {path}`, or train {path / 'recipe.yaml'} anew"
        raise RecipeError(f"{path} is a folder, not a recipe{run if (path / 'recipe.yaml').is_file() else ''}")
    if path.parent in (Path("."), Path("recipes")) and path.suffix == ".yaml" and path.stem in shipped:
        return shipped[path.stem]
    endings = (path.with_name(f"{path.name}.yaml"), path.with_suffix(".yaml"), path.with_suffix(".yml"))
    close = next((file for file in endings if file.is_file()), None) or nearest(path.stem, shipped)
    hint = f"did you mean {close}? " if close else ""
    raise RecipeError(f"no recipe at {path}: no such file, and LightLM ships {', '.join(shipped)}; {hint}".rstrip("; "))
