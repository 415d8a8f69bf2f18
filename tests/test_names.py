"""Where a known name is also a file or folder here, the known name wins, and a note says how to write the file."""

import logging
from pathlib import Path

import pytest

from lightlm.convert import load
from lightlm.data.sources.local import LocalSource
from lightlm.data.sources.registry import open_source
from lightlm.data.tokenizer import load_tokenizer, train_tokenizer
from lightlm.names import nearest
from lightlm.recipe import find_recipe, recipes_folder
from tests.corpus import TINY_RECIPE, texts


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load._note_clash.cache_clear()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "lightlm")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_source(said):
    open_source("pydocs")
    assert said() == []
    Path("pydocs").mkdir()
    Path("pydocs/a.txt").write_text("my own words")
    assert not isinstance(open_source("pydocs"), LocalSource)
    (note,) = said()
    assert "pydocs means the data set" in note
    assert "a folder of that name here: write ./pydocs" in note
    assert isinstance(open_source("./pydocs"), LocalSource)
    assert len(said()) == 1


def test_a_tokenizer(said):
    trained = train_tokenizer(texts(20), 300)
    Path("gpt2").mkdir()
    trained.save("gpt2/tokenizer.json")
    train_tokenizer(texts(20), 310).save("hub.json")
    asked = []

    def download(repository, hint):
        asked.append(repository)
        return Path("hub.json")

    load_tokenizer("gpt2", download)
    assert asked == ["openai-community/gpt2"]
    assert "write ./gpt2" in said()[0]
    assert load_tokenizer("./gpt2", download).sha256 == trained.sha256
    assert len(asked) == len(said()) == 1


def test_a_recipe(said):
    Path("demo.yaml").write_text(TINY_RECIPE)
    assert find_recipe("demo") == recipes_folder() / "demo.yaml"
    assert "demo means the recipe that LightLM ships" in said()[0]
    assert "write ./demo.yaml" in said()[0]
    assert find_recipe("demo.yaml") == find_recipe("./demo.yaml") == Path("demo.yaml")
    assert len(said()) == 1


def test_a_model(said, monkeypatch):
    monkeypatch.setattr(load, "_download", lambda hub_id, weights: Path("downloaded", hub_id))
    assert load.locate("gpt2") == Path("downloaded/openai-community/gpt2")
    assert load.is_hub_id("gpt2")
    assert said() == []
    load._note_clash.cache_clear()
    make_run(Path("gpt2"))
    assert load.locate("gpt2") == load.locate("gpt2") == Path("downloaded/openai-community/gpt2")
    (note,) = said()
    assert "gpt2 means openai-community/gpt2 on the Hugging Face Hub" in note
    assert "write ./gpt2" in note
    assert load._on_disk("./gpt2") == Path("gpt2")


def test_a_run_comes_before_all_else(said):
    make_run(Path("runs/gpt2"))
    make_run(Path("gpt2"))
    assert not load.is_hub_id("gpt2")
    assert load._on_disk("gpt2") == Path("runs/gpt2")
    load._note_clash("gpt2")
    first, second = said()
    assert "gpt2 means the run runs/gpt2; for the model on the Hub write openai-community/gpt2" in first
    assert "write ./gpt2" in second


def make_run(folder):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(TINY_RECIPE)


def test_the_nearest_name_resembles_what_was_typed():
    known = ["router", "num_heads", "hidden_size", "norm"]
    assert nearest("dropout", known) is None
    assert nearest("heads", known) == "num_heads"
    assert nearest("hiden_size", known) == "hidden_size"
