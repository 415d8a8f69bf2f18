"""Recipe keys: described, listed by the command line, and held together with the schema file for editors."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse
from urllib.request import url2pathname

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, Field

import lightlm.recipe.reference as reference
from lightlm.errors import UsageError
from lightlm.model.config import ModelConfig
from lightlm.recipe import load_recipe, recipes_folder, shipped_recipes
from lightlm.recipe.reference import SCHEMA_FILE, json_schema, keys, schema_text
from tests.cli.runner import Runner
from tests.shapes import without_hub


class YAML12(yaml.SafeLoader):
    """Reads 1e-3 as a number, as editors do."""


YAML12.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"\d+(\.\d*)?[eE][-+]?\d+$"), list("0123456789"))


def with_override(key, value):
    values = yaml.load(schema_free("demo"), YAML12)
    section, _, name = key.rpartition(".")
    (values.setdefault(section, {}) if section else values)[name] = value
    return values


def schema_free(name):
    return (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def test_every_key_of_a_recipe_is_described():
    described = {entry.key: entry for entry in keys()}
    assert {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)} <= set(described)
    resolved = load_recipe("moe-demo").to_dict()
    given = {f"{name}.{key}" for name, section in resolved.items() if isinstance(section, dict) for key in section}
    assert given <= set(described)
    for entry in described.values():
        assert entry.description.endswith("."), entry
        assert entry.allowed, entry


def test_the_schema_file_is_that_of_the_code():
    """After a change of the schema: python -m lightlm.recipe.reference."""
    assert (recipes_folder() / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_a_shipped_recipe_names_the_schema_and_fits_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")
    jsonschema.validate(yaml.load(text, YAML12), json_schema())
    jsonschema.validate(load_recipe(path, find_start=without_hub).to_dict(), json_schema())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train.tokens", "1.5B", True),
        ("train.tokens", 1e9, True),
        ("train.tokens", "3X", False),
        ("train.batch_tokens", "512K", True),
        ("schedule.warmup", "2.5%", True),
        ("schedule.warmup", "375M", True),
        ("schedule.warmup", "x%", False),
        ("train.compile", "auto", True),
        ("train.compile", "yes please", False),
        ("optimizer.lr", "fast", False),
        ("model.norm", "rms", False),
        ("model.num_layer", 8, False),
        ("evals", {}, False),
        ("eval.limit", None, True),
    ],
)
def test_an_editor_marks_what_the_recipe_refuses(key, value, allowed):
    validator = jsonschema.validators.validator_for(json_schema())(json_schema())
    assert validator.is_valid(with_override(key, value)) == allowed


@pytest.mark.parametrize(
    ("model", "init_from", "allowed"),
    [
        ({}, "runs/demo", True),
        (None, "runs/demo", True),
        ({"max_seq_len": 512}, "runs/demo", True),
        (None, None, False),
        ({"max_seq_len": 512}, None, False),
    ],
)
def test_an_editor_asks_for_a_shape_unless_the_recipe_starts_from_a_model(model, init_from, allowed):
    values = with_override("train.init_from", init_from)
    del values["model"]
    values |= {} if model is None else {"model": model}
    validator = jsonschema.validators.validator_for(json_schema())(json_schema())
    assert validator.is_valid(values) == allowed


def test_a_key_tells_type_default_and_meaning():
    found = {entry.key: entry for entry in keys("schedule")}
    assert found["schedule.name"].allowed == "wsd | cosine | linear | constant"
    assert found["schedule.name"].default == "wsd"
    assert found["schedule.min_lr_ratio"].allowed == "0 <= number <= 1"
    assert keys("train.tokens")[0].default == "required"
    assert {entry.key.partition(".")[0] for entry in keys()} == set(reference.sections())


def test_an_unknown_section_names_the_nearest():
    with pytest.raises(UsageError, match=r"no section optimiser; did you mean optimizer\?"):
        keys("optimiser")
    with pytest.raises(UsageError, match=r"did you mean optimizer\.lr\?"):
        keys("lr")
    with pytest.raises(UsageError, match="sections are name, model, data"):
        keys("zzz")


def test_a_section_that_is_a_union_lists_the_keys_of_all_members(monkeypatch):
    class Plain(BaseModel):
        name: Literal["plain"] = Field(default="plain", description="As ever.")
        lr: float = Field(description="Rate.")

    class Fancy(BaseModel):
        name: Literal["fancy"] = Field(default="fancy", description="With a twist.")
        lr: float = Field(description="Rate.")
        twist: int = Field(default=3, description="Turns.")

    class Whole(BaseModel):
        model: ModelConfig = Field(description="What.")
        optimizer: Plain | Fancy = Field(description="How.")

    monkeypatch.setattr(reference, "Recipe", Whole)
    found = {entry.key: entry for entry in keys()}
    assert found["optimizer.name"].allowed == "plain | fancy"
    assert found["optimizer.name"].description == "plain: As ever. fancy: With a twist."
    assert found["optimizer.name"].default == "plain"
    assert found["optimizer.twist"].description == "Turns. Only with optimizer.name=fancy."
    assert found["optimizer.lr"].description == "Rate."


def test_the_command_lists_keys_for_people_and_programs(monkeypatch, capsys):
    run = Runner(monkeypatch, capsys)
    listed = json.loads(run("recipes", "keys", "--json").stdout)
    assert [entry["key"] for entry in listed] == [entry.key for entry in keys()]
    shown = run("recipes", "keys", "checkpoint").stdout
    assert "keep_every" in shown
    assert "momentum" not in shown
    assert run("recipes", "keys", "chekpoint").code == 2


def test_a_copied_recipe_still_names_its_schema(tmp_path, monkeypatch, capsys):
    run = Runner(monkeypatch, capsys)
    assert run("recipes", "cp", "moe", str(tmp_path)).code == 0
    first, *others = (tmp_path / "moe.yaml").read_text(encoding="utf-8").splitlines()
    assert Path(url2pathname(urlparse(first.partition("$schema=")[2]).path)).is_file()
    assert others == schema_free("moe").splitlines()[1:]
    about = json.loads(run("recipes", "ls", "--json").stdout)
    assert all(row["about"] and "$schema" not in row["about"] for row in about)
