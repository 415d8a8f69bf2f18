"""`lightlm recipes`: the recipes that LightLM ships."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lightlm.cli.console import out, print_json
from lightlm.errors import UsageError

recipes = typer.Typer(no_args_is_help=True, help="List, show and copy shipped recipes; look up recipe keys.")


_EDITOR_LINE = "# yaml-language-server: $schema="  # tells editors where the JSON Schema of recipes is


def _own_lines(path: Path) -> list[str]:
    """Return the lines of a recipe without the one for editors."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if not line.startswith(_EDITOR_LINE)]


@recipes.command("ls")
def list_recipes(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List the shipped recipes with their parameters, tokens and Hugging Face classes."""
    import torch
    from rich.table import Table

    from lightlm.convert.huggingface.layouts import export_target
    from lightlm.model.transformer import Transformer
    from lightlm.quantities import format_quantity
    from lightlm.recipe import load_recipe, shipped_recipes

    rows: list[dict[str, Any]] = []
    for path in shipped_recipes():
        recipe = load_recipe(path)
        # Where the vocabulary comes from the data, the table assumes the GPT-2 tokenizer's.
        config = recipe.model if recipe.model.vocab_size else load_recipe(path, ["model.vocab_size=50257"]).model
        with torch.device("meta"):
            parameters = Transformer(config).num_parameters()["total"]
        about = _own_lines(path)[0].strip("# \n")
        target = export_target(recipe.model)
        rows.append(
            {
                "recipe": path.stem,
                "parameters": parameters,
                "vocab_size": config.vocab_size,
                "tokens": recipe.train.tokens,
                "exports_to": target.architecture or "-",
                "about": about,
            }
        )
    if as_json:
        print_json(rows)
        return
    table = Table(caption="Parameters with 50,257 entries where the vocabulary comes from the data.")
    for heading in ("recipe", "parameters", "tokens", "exports to", "about"):
        justify: Literal["left", "right"] = "right" if heading in ("parameters", "tokens") else "left"
        table.add_column(heading, justify=justify, no_wrap=heading != "about")
    for row in rows:
        table.add_row(
            row["recipe"],
            format_quantity(row["parameters"]),
            format_quantity(row["tokens"]),
            row["exports_to"],
            row["about"],
        )
    out.print(table)


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A recipe's name.")]) -> None:
    """Print a recipe."""
    from lightlm.recipe import find_recipe

    print("".join(_own_lines(find_recipe(name))), end="")


@recipes.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    destination: Annotated[Path, typer.Argument(metavar="[DEST]", help="A file or folder.")] = Path("."),
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
    target.write_text("".join(lines), encoding="utf-8")
    out.print(f"{target}: train it with `lightlm train {target}`", markup=False)


@recipes.command("keys")
def list_keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="One section, such as optimizer; all unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the keys of a recipe: allowed values, default, meaning."""
    from dataclasses import asdict
    from itertools import groupby

    from rich.table import Table
    from rich.text import Text

    from lightlm.recipe.reference import keys, sections

    found = keys(section)
    if as_json:
        print_json([asdict(entry) for entry in found])
        return
    titles = sections()
    for name, group in groupby(found, key=lambda entry: entry.key.partition(".")[0]):
        table = Table(title=f"{name}: {titles[name]}", title_justify="left", box=None, padding=(0, 2, 1, 0))
        table.add_column("key", no_wrap=True)
        for heading in ("allowed", "default", "description"):
            table.add_column(heading)
        for entry in group:
            inner = entry.key.removeprefix(f"{name}.")
            table.add_row(*(Text(text) for text in (inner, entry.allowed, entry.default, entry.description)))
        out.print(table)
