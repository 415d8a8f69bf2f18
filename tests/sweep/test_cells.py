"""Contestants, their names and their checks."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightlm.errors import RecipeError, UsageError
from lightlm.recipe import NAME_PATTERN
from lightlm.sweep.cells import Cell, Contestant, choose_seeds, grid, resolve
from lightlm.sweep.values import read_settings


def test_a_grid_is_every_combination_and_single_values_are_changes_of_all():
    settings = read_settings(["optimizer.lr=1e-3,3e-3", "train.tokens=200K", "optimizer.betas=[0.9,0.95],[0.9,0.99]"])
    contestants = grid("demo", settings)
    assert [entry.name for entry in contestants] == [
        "lr=1e-3 betas=[0.9,0.95]",
        "lr=1e-3 betas=[0.9,0.99]",
        "lr=3e-3 betas=[0.9,0.95]",
        "lr=3e-3 betas=[0.9,0.99]",
    ]
    assert contestants[1].changes == ("train.tokens=200K", "optimizer.lr=1e-3", "optimizer.betas=[0.9,0.99]")
    assert contestants[1].values == {"optimizer.lr": "1e-3", "optimizer.betas": "[0.9,0.99]"}


def test_keys_that_end_alike_are_named_in_full():
    contestants = grid("demo", read_settings(["optimizer.name=adamw,muon", "schedule.name=wsd,cosine"]))
    assert contestants[0].name == "optimizer.name=adamw schedule.name=wsd"


def test_run_folders_are_named_by_values():
    assert Cell(Contestant("lr=1e-3", "demo"), 1337).name == "lr-1e-3_seed-1337"
    assert Cell(Contestant("lr=1e-3 tokens=200K", "demo"), 1).name == "lr-1e-3-tokens-200K_seed-1"
    assert Cell(Contestant("bias=-1", "demo"), 1).name != Cell(Contestant("bias=1", "demo"), 1).name


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_name_gives_a_folder_and_different_values_give_different_ones(first, second):
    one, two = (Cell(Contestant(f"key={text}", "demo"), 3).name for text in (first, second))
    assert re.fullmatch(NAME_PATTERN, one)
    assert len(one) < 100
    assert (one == two) == (first == second)


def test_seeds_come_from_the_recipe_the_option_or_the_setting():
    def seeds(*settings, count=None):
        lists = read_settings(settings)
        chosen = choose_seeds("demo", lists, count)
        assert "train.seed" not in lists
        return chosen

    assert seeds() == seeds("optimizer.lr=1e-4..1e-2") == (1337,)
    assert seeds(count=3) == (1337, 1338, 1339)
    assert seeds("train.seed=7", count=2) == (7, 8)
    assert seeds("train.seed=5,3,5") == (5, 3)
    with pytest.raises(UsageError, match="both choose seeds"):
        seeds("train.seed=1,2", count=2)
    with pytest.raises(UsageError, match="whole numbers"):
        seeds("train.seed=1,x")


def resolved(*settings):
    notes = []
    return resolve(grid("demo", read_settings(settings)), [1], notes.append), notes


def test_all_mistakes_of_all_recipes_are_one_message():
    with pytest.raises(RecipeError) as caught:
        resolved("optimizer.lr=1e-3,fast,-1", "train.sequence=1,2")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 mistakes in the recipes of this sweep; nothing has run:"
    for part in ("not 'fast'", "not -1", "[override train.sequence=1]", "[override train.sequence=2]"):
        assert sum(part in line for line in lines) == 1, part


def test_equal_recipes_run_once_with_a_note():
    recipes, notes = resolved("optimizer.lr=1e-3,0.001,3e-3,1e-3")
    assert list(recipes) == ["lr=1e-3", "lr=3e-3"]
    assert notes == ["'lr=0.001' means the same as 'lr=1e-3' and is left out", "'lr=1e-3' is there twice and runs once"]


def test_names_that_one_folder_would_have_are_refused():
    with pytest.raises(UsageError, match="rename one"):
        resolve([Contestant("gpt 2", "demo"), Contestant("gpt=2", "demo", ("optimizer.lr=1e-3",))], [1], print)
