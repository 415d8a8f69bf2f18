"""What a sweep runs: contestants, each a recipe with changes, and cells, each a contestant with a seed."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import xxhash

from lightlm.convert.load import find_start
from lightlm.errors import LightLMError, RecipeError, UsageError
from lightlm.recipe import Recipe, load_recipe
from lightlm.sweep.values import is_range

_LONGEST = 60  # characters of a contestant in the name of a run's folder
_SEED = "train.seed"


@dataclass(frozen=True)
class Contestant:
    """A recipe with changes.

    Attributes:
        name: unique in its sweep, as tables and plots show it.
        recipe: a recipe's path or name.
        changes: overrides `key=value`. The seed is not among them.
        values: what tells it from the others, by key; plots take their x axis from it.
    """

    name: str
    recipe: str
    changes: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    contestant: Contestant
    seed: int

    @property
    def name(self) -> str:
        """The name of its run's folder, which does not depend on the other cells."""
        return f"{folder_name(self.contestant.name)}_seed-{self.seed}"

    @property
    def seed_override(self) -> str:
        return f"{_SEED}={self.seed}"

    @property
    def changes(self) -> list[str]:
        return [*self.contestant.changes, self.seed_override]


def folder_name(name: str) -> str:
    """Return a name that is a folder's on every system. It ends in a hash where it says less than `name`."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")
    if len(plain) <= _LONGEST and re.fullmatch(r"[A-Za-z0-9._]+([=, -][A-Za-z0-9._]+)*", name):
        return plain
    return f"{plain[:_LONGEST].rstrip('-._') or 'run'}-{xxhash.xxh3_64_hexdigest(name.encode())[:6]}"


def grid(recipe: str, settings: Mapping[str, Sequence[str]]) -> list[Contestant]:
    """Return a contestant for each combination of values; a key with one value is a change of all.

    The first key varies slowest. Names hold the last part of each key, or the whole key where two end alike.
    """
    fixed = [f"{key}={values[0]}" for key, values in settings.items() if len(values) == 1]
    swept = {key: values for key, values in settings.items() if len(values) > 1}
    return [
        contestant(recipe, dict(zip(swept, combination, strict=True)), fixed)
        for combination in itertools.product(*swept.values())
    ]


def contestant(recipe: str, values: Mapping[str, str], fixed: Sequence[str] = ()) -> Contestant:
    """Return the contestant of these values, named after them, with changes that all share."""
    names = short_keys(list(values))
    name = " ".join(f"{names[key]}={value}" for key, value in values.items()) or "recipe"
    return Contestant(name, recipe, (*fixed, *(f"{key}={value}" for key, value in values.items())), dict(values))


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted key, or the whole key where another ends alike."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}


def choose_seeds(recipe: str, settings: dict[str, list[str]], count: int | None) -> tuple[int, ...]:
    """Take `train.seed` out of the settings, and return the seeds of the sweep.

    They are the values of `train.seed=1,2,3`. One value, or else the recipe's own, is the first of `count` in a row.

    Raises:
        UsageError: several seeds are given and `count` too, or one is not a whole number.
    """
    given = settings.pop(_SEED, [])
    if count is not None and len(given) > 1:
        raise UsageError(f"--seeds {count} and {_SEED}={','.join(given)} both choose seeds; leave one out")
    try:
        seeds = tuple(dict.fromkeys(int(text) for text in given))
    except ValueError:
        raise UsageError(f"{_SEED}={','.join(given)}: seeds are whole numbers") from None
    if len(seeds) > 1:
        return seeds
    if not seeds:
        try:
            first = [f"{key}={values[0]}" for key, values in settings.items() if not is_range(values[0])]
            seeds = (read_recipe(recipe, first).train.seed,)
        except (RecipeError, UsageError):
            seeds = (0,)  # `resolve` reports the mistakes of all recipes at once
    return tuple(range(seeds[0], seeds[0] + (count or 1)))


def resolve(contestants: Sequence[Contestant], seeds: Sequence[int], note: Callable[[str], None]) -> dict[str, Recipe]:
    """Return each contestant's recipe by name, with the first seed. Of equal ones, the first stays, with a note.

    Raises:
        UsageError: there is no contestant, or two different ones have one name.
        RecipeError: recipes have mistakes; the message lists those of all.
    """
    if not contestants or not seeds:
        raise UsageError("a sweep needs at least one recipe and one seed")
    recipes: dict[str, Recipe] = {}
    mistakes: dict[str, None] = {}
    names: dict[str, str] = {}
    seen: dict[str, Contestant] = {}
    for entry in contestants:
        if seen.setdefault(entry.name, entry) != entry:
            raise UsageError(f"two contestants are named '{entry.name}'; rename one")
        folder = Cell(entry, 0).name.casefold()
        if folder in names and names[folder] != entry.name:
            raise UsageError(f"the runs of '{names[folder]}' and '{entry.name}' would have one name; rename one")
        if entry.name in recipes:
            note(f"'{entry.name}' is there twice and runs once")
            continue
        names[folder] = entry.name
        try:
            found = read_recipe(entry.recipe, Cell(entry, seeds[0]).changes)
        except (RecipeError, UsageError) as error:
            mistakes |= dict.fromkeys(_lines(error))
            continue
        twin = next((name for name, other in recipes.items() if other == found), None)
        if twin is not None:
            note(f"'{entry.name}' means the same as '{twin}' and is left out")
            continue
        recipes[entry.name] = found
    if mistakes:
        count = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "1 mistake"
        raise RecipeError(f"{count} in the recipes of this sweep; nothing has run:\n" + "\n".join(mistakes))
    for seed in seeds[1:]:
        read_recipe(contestants[0].recipe, Cell(contestants[0], seed).changes)
    return recipes


def check_needs(recipes: Mapping[str, Recipe]) -> None:
    """Find a device, a task or a prepared data folder that these recipes name and that is missing.

    Raises:
        LightLMError: something is missing; the message says how to get it.
    """
    from lightlm.choices import check_device
    from lightlm.data.folder import check_prepared
    from lightlm.data.training_data import folder_paths

    for device in {recipe.train.device for recipe in recipes.values()}:
        check_device(device)
    if tasks := list(dict.fromkeys(task for recipe in recipes.values() for task in recipe.eval.tasks)):
        from lightlm.evaluate.tasks import references

        references.check_names(tasks)
    folders = [path for recipe in recipes.values() for path in folder_paths(recipe.data.sources).values()]
    check_prepared(dict.fromkeys(folders))


def _lines(error: LightLMError) -> list[str]:
    """Return the mistakes that a message lists, or its only one."""
    heading, _, rest = str(error).partition("\n")
    return rest.splitlines() if rest else [f"  {heading}"]


def read_recipe(recipe: str, changes: Sequence[str]) -> Recipe:
    """Read a recipe as its run will, which prints the notes."""
    return load_recipe(recipe, changes, lambda note: None, find_start)
