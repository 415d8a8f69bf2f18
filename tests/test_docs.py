"""The site: generated pages name every key and option, all pages are in the navigation, it builds without warnings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from rich.text import Text

from lightlm.cli.app import app
from lightlm.convert.formats import FORMATS
from lightlm.recipe.reference import keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"reference/recipe.md", "reference/commands.md", "reference/formats.md"}


def generate(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, DOCS / "generate.py", folder], check=True, env=environment)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    generate(folder)
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_the_recipe_reference_has_every_key_with_its_description(pages):
    rows = {
        row[0].strip("`"): row[3] for row in (line.strip("| ").split(" | ") for line in table_rows(pages["recipe"]))
    }
    assert set(rows) == {entry.key for entry in keys()}
    for entry in keys():
        assert rows[entry.key] == entry.description.replace("|", "\\|").replace("<", "&lt;")


def test_the_formats_page_is_the_registry(pages):
    """Each format with what it needs, each class that is read, and a reason for each model that a format lacks."""
    parts = pages["formats"].split("\n## ")
    rows = {row[0].strip("`"): row for row in (line.strip("| ").split(" | ") for line in table_rows(parts[0]))}
    assert rows.keys() == FORMATS.keys()
    for name, known in FORMATS.items():
        assert (known.takes or "-", known.makes or "-") == (rows[name][1], rows[name][2])
        assert all(kind in parts[3] for kind in known.kinds)
    models = [line.strip("| ").split(" | ") for line in parts[1].splitlines() if line.startswith("| ")][2:]
    reasons = [line for line in parts[2].splitlines() if line.startswith("| ")][2:]
    assert len(models) > 15
    assert sum(cell == "-" for row in models for cell in row) == len(reasons) > 3
    assert any("GPT2LMHeadModel | gpt2 of llama.cpp | ONNX graph" in " | ".join(row) for row in models)


def table_rows(page):
    return [line for line in page.splitlines() if line.startswith(("| `", "| <code>"))]


def commands(name, command):
    yield name, command
    for inner, child in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {inner}", child)


def test_the_command_reference_has_every_command_argument_and_option(pages):
    parts = re.split(r"^## ", pages["commands"], flags=re.MULTILINE)[1:]
    described = {part.partition("\n")[0]: part for part in parts}
    all_commands = dict(commands("lightlm", typer.main.get_command(app)))
    assert set(described) == set(all_commands)
    assert len(all_commands) >= 12
    for name, command in all_commands.items():
        assert described[name].splitlines()[2], name
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            names = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or parameter.name]
            rows = [
                line for line in table_rows(described[name]) if names[-1].lower() in line.partition(" | ")[0].lower()
            ]
            assert rows, (name, names)
            assert not rows[0].endswith("|  |"), f"{name}: {names} has no help"


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [leaf for child in children for leaf in leaves(child)]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | GENERATED
    assert sorted(listed) == sorted(pages)


def test_architecture_tells_where_at_least_25_things_are_changed():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Where do I change X?")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 25


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("zensical")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    generate(tmp_path / "docs" / "reference")
    command = [sys.executable, "-c", "from zensical.main import cli; cli()", "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "reference" / "recipe" / "index.html").is_file()


def test_no_help_text_loses_its_brackets():
    """rich takes a word in brackets for a style, and prints nothing of it."""
    lost = {}
    for name, command in commands("lightlm", typer.main.get_command(app)):
        for parameter in command.params:
            help_text = getattr(parameter, "help", None) or ""
            styles = {str(span.style) for span in Text.from_markup(help_text).spans} - {"dim"}
            if styles:
                lost[f"{name} {parameter.name}"] = styles
    assert lost == {}
