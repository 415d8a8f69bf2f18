"""`lightlm recipes`: the recipes that LightLM ships."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lightlm import files
from lightlm.cli.console import out, print_json, print_table
from lightlm.errors import UsageError

recipes = typer.Typer(no_args_is_help=True, help="List, show and copy shipped recipes; look up recipe keys.")


_GPT2_VOCABULARY = 50_257  # of the tokenizer that prepare-data takes for a Hub data set
_SKILLS_VOCABULARY = 470  # train:512 finds no more in it; with the two tokens of ChatML
_EDITOR_LINE = "# yaml-language-server: $schema="  # tells editors where the JSON Schema of recipes is


def _own_lines(path: Path) -> list[str]:
    """Return the lines of a recipe without the one for editors."""
    from lightlm.recipe.yaml_text import read_text

    lines = read_text(path).splitlines(keepends=True)
    return [line for line in lines if not line.startswith(_EDITOR_LINE)]


@recipes.command("ls")
def list_recipes(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List the shipped recipes with their parameters, tokens and Hugging Face classes."""
    from lightlm.quantities import format_quantity
    from lightlm.recipe import shipped_recipes

    rows = [_listed(path) for path in shipped_recipes()]
    if as_json:
        print_json(rows)
        return
    shown = ("recipe", "parameters", "tokens", "exports_to", "about")
    texts = [[format_quantity(v) if isinstance(v := row[key], int) else v or "-" for key in shown] for row in rows]
    caption = "Parameters with the recipe's own vocabulary, or that of its prepare-data command; -: the model's."
    print_table(texts, *(key.replace("_", " ") for key in shown), right=[1, 2], whole=[0, 3], caption=caption)


def _listed(path: Path) -> dict[str, Any]:
    """Return a recipe's entry in the list; None for what depends on the model that it starts from."""
    from dataclasses import replace

    from lightlm.convert.huggingface.layouts import export_target
    from lightlm.model.counting import count_parameters
    from lightlm.quantities import parse_quantity
    from lightlm.recipe import load_recipe
    from lightlm.recipe.yaml_text import read_sections

    lines, (sections, _) = _own_lines(path), read_sections(path)
    about = lines[0].strip("# \n")
    if "model" not in sections:
        of_model = dict.fromkeys(("parameters", "active_parameters", "vocab_size"))
        tokens = parse_quantity(sections["train"]["tokens"])
        return {"recipe": path.stem, **of_model, "tokens": tokens, "exports_to": "-", "about": about}
    recipe = load_recipe(path)
    config = replace(recipe.model, vocab_size=recipe.model.vocab_size or _prepared_vocabulary(lines))
    counts = count_parameters(config)
    return {
        "recipe": path.stem,
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "vocab_size": config.vocab_size,
        "tokens": recipe.train.tokens,
        "exports_to": export_target(recipe.model).architecture or "-",
        "about": about,
    }


def _prepared_vocabulary(lines: list[str]) -> int:
    """Return the vocabulary that the prepare-data command in a recipe's first comment makes; GPT-2's by default."""
    command = next(line for line in lines if "lightlm prepare-data" in line)
    trained = re.search(r"--tokenizer train:(\d+)", command)
    if trained:
        return int(trained[1])
    return _SKILLS_VOCABULARY if "prepare-data skills" in command else _GPT2_VOCABULARY


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name.")]) -> None:
    """Print a recipe."""
    from lightlm.recipe import find_recipe

    print("".join(_own_lines(find_recipe(name))), end="")


@recipes.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A file or folder.")] = Path("."),
) -> None:
    """Copy a recipe, so that you can change it."""
    from lightlm.recipe import find_recipe, recipes_folder
    from lightlm.recipe.reference import SCHEMA_FILE

    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise UsageError(f"{target} exists; name another file")
    if not target.parent.is_dir():
        raise UsageError(f"no folder {target.parent} to copy to; create it first")
    schema = (recipes_folder() / SCHEMA_FILE).absolute().as_uri()
    lines = [f"{_EDITOR_LINE}{schema}\n", *_own_lines(source)]
    files.write_text(target, "".join(lines))
    out.print(f"{target}: train it with `lightlm train {target}`", markup=False)


@recipes.command("keys")
def list_keys(
    section: Annotated[
        str | None, typer.Argument(metavar="SECTION", help="One section, such as optimizer; all unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the keys of a recipe: allowed values, default, meaning."""
    from dataclasses import asdict
    from itertools import groupby

    from lightlm.recipe.reference import keys, sections

    found = keys(section)
    if as_json:
        print_json([asdict(entry) for entry in found])
        return
    titles = sections()
    for name, group in groupby(found, key=lambda entry: entry.key.partition(".")[0]):
        rows = []
        for entry in group:
            default = "required" if entry.default == "required" else f"default {entry.default}"
            rows.append((entry.key, f"{entry.allowed}; {default}\n{entry.description}"))
        headings = ("key", "allowed; default; meaning")
        print_table(rows, *headings, whole=[0], title=f"{name}: {titles[name]}", box=None, padding=(0, 2, 1, 0))
