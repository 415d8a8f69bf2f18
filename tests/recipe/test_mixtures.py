"""Mixtures in recipes: what they mean, how overrides replace them, and their mistakes."""

import pytest

from lightlm.errors import RecipeError, UsageError
from lightlm.recipe import load_recipe


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("data.mix={}", ["data.mix: names no folder"]),
        ("data.mix=a", ["data.mix: should be a section with keys of its own"]),
        ("data.mix={a: 0, b: 0}", ["data.mix: the weights sum to 0"]),
        (
            "data.mix={a: -1, b: .inf}",
            ["data.mix.a: should be greater than or equal to 0", "data.mix.b: should be a fin"],
        ),
        (
            "data.mix={a: 70%, b: true}",
            ["data.mix.a: write a number such as 0.7", "data.mix.b: write a number such as"],
        ),
        ("data.stages=[]", ["data.stages: list should have at least 1 item"]),
        ("data.stages=[3]", ["data.stages.0: should be a section"]),
        (
            "data.stages=[{until: 50%}, {dataset: a, mix: {a: 1}}]",
            ["stages.0: needs a mix or", "stages.1: has both a mix"],
        ),
        (
            "data.stages=[{dataset: a}, {dataset: b, until: 9%}]",
            ["data.stages.0.until: is missing", "data.stages.1.until: 9%: the last stage ends with the run"],
        ),
        (
            "data.stages=[{until: soon, datset: a}, {dataset: b}]",
            ["stages.0.until: write a share", "0.datset: unknown key; did you mean data.stages.dataset"],
        ),
    ],
)
def test_mistakes_in_mixtures_are_reported_all_at_once(override, messages):
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", [override, "optimizer.lr=fast"], lambda note: None)
    lines = str(error.value).splitlines()[1:]
    assert any("optimizer.lr" in line for line in lines)
    for message in messages:
        assert sum(message in line for line in lines) == 1, str(error.value)


def test_stages_that_do_not_fit_the_run_are_refused():
    stages = "data.stages=[{until: 10B, dataset: a}, {until: 0%, dataset: b}, {until: 100%, dataset: b}, {dataset: c}]"
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", [stages, "train.batch_tokens=5000"], lambda note: None)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 4
    for part in (
        "stages.0.until: 10B leaves nothing of",
        "1.until: 0% is not above",
        "2.until: 100% leaves nothing of",
    ):
        assert sum(part in line for line in lines) == 1


def test_what_a_run_trains_on_is_named_once(tmp_path):
    notes = []
    mixed = load_recipe("demo", ["data.mix.a=0.5", "data.mix.b/c=1"], notes.append)
    assert mixed.data.parts == [(None, {"a": 0.5, "b/c": 1.0})]
    assert mixed.data.sources == ["a", "b/c"]
    assert len(notes) == 1
    assert notes[0].endswith("is left out: 'data.mix.b/c=1' replaces it")
    path = tmp_path / "mixed.yaml"
    path.write_text(mixed.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == mixed
    again = load_recipe(path, ["data.dataset=x"], notes.append)
    assert again.data.sources == ["x"]
    assert notes[1] == f"data.mix of {path} is left out: 'data.dataset=x' replaces it"
    assert load_recipe(path, ["data.mix.a=0"], notes.append).data.sources == ["b/c"]
    with pytest.raises(RecipeError, match=r"data\.mix: excludes data\.dataset"):
        load_recipe(path, ["data.dataset=x", "data.mix={a: 1}"])


def test_overrides_reach_into_stages_and_names_with_dots(tmp_path):
    path = tmp_path / "staged.yaml"
    stages = "data.stages=[{until: 50%, mix: {a: 1, ../b.v2: 1}}, {dataset: c}]"
    path.write_text(load_recipe("demo", [stages], lambda note: None).to_yaml(), encoding="utf-8")
    changes = ["data.stages.0.until=80%", "data.stages.0.mix.../b.v2=3", "data.stages.1.dataset=d"]
    assert load_recipe(path, changes).data.parts == [("80%", {"a": 1.0, "../b.v2": 3.0}), (None, {"d": 1.0})]
    assert load_recipe("demo", ["data.mix.a.1=2"], lambda note: None).data.sources == ["a.1"]
    for key in ("2.until", "-1.until", "last.until", "x"):
        with pytest.raises(UsageError, match=r"stages is a list; its entries are stages\.0 to stages\.1"):
            load_recipe(path, [f"data.stages.{key}=3"])
    with pytest.raises(
        RecipeError, match=r"data\.stages\.0\.until: write a share.*override data\.stages\.0\.until=soon"
    ):
        load_recipe(path, ["data.stages.0.until=soon"])


def test_names_of_folders_are_text(tmp_path):
    path = tmp_path / "years.yaml"
    text = load_recipe("demo").to_yaml()
    stages = "  stages:\n  - {until: 010%, mix: {2024: 1, no: 0.5}}\n  - {dataset: 007}\n"
    path.write_text(text.replace("  dataset: pydocs\n", stages), encoding="utf-8")
    assert load_recipe(path).data.parts == [("010%", {"2024": 1.0, "no": 0.5}), (None, {"007": 1.0})]
    assert load_recipe(path).data.main == "007"
