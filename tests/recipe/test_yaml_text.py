"""Recipe files as people's editors and shells write them: what is read, and what is refused with its line."""

import typing

import pytest
from pydantic import BaseModel

from lightlm.errors import RecipeError, UsageError
from lightlm.recipe import Recipe, load_recipe
from lightlm.recipe.sections.data import Stage
from lightlm.recipe.sections.distill import DistillSection
from lightlm.recipe.sections.train import MTPSection
from lightlm.recipe.yaml_text import TEXT_KEYS, read_sections, read_value

RECIPE = """\
name: mine
model: {num_layers: 2, hidden_size: 32, num_heads: 4, max_seq_len: 32}
data: {dataset: mine}
train: {tokens: 10K, batch_tokens: 1K}
optimizer:
  lr: 1e-3
"""


@pytest.fixture
def written(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode(encoding))
        return path

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_files_of_windows_editors_are_read(written, encoding, newline):
    assert load_recipe(written(RECIPE.replace("\n", newline), encoding)).optimizer.lr == 0.001


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("model: {num_layers: 4}\n", "mine.yaml:7: model is given twice, first in line 2; keep one"),
        ("  lr: 3e-3\n", "mine.yaml:7: lr is given twice, first in line 6; keep one"),
        ("\tweight_decay: 0.1\n", "mine.yaml:7: a tab, where YAML wants spaces"),
        ("tracking:\n\tbackends: []\n", "mine.yaml:8: a tab, where YAML wants spaces"),
        ("tracking:\tx: 1\n", "mine.yaml:7: a tab"),
        ("moe: [1\n", "mine.yaml:8: not valid YAML"),
        ("moe: !python/object 1\n", "mine.yaml:7: not valid YAML: could not determine a constructor"),
        ("---\nname: two\n", "mine.yaml:7: not valid YAML: expected a single document"),
        ("moe: \x07\n", "mine.yaml:7: the character U+0007 is not allowed"),
        ("moe: " + "[" * 5000, "nested too deeply"),
        ("1: 2\n", "is not a recipe; write its sections"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(written, added, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(written(RECIPE + added))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n", "is not a recipe"),
        (b"name: caf\xe9\n", "mine.yaml:1: byte 10 is not utf-8; save the file as UTF-8"),
        (RECIPE.encode("utf-16-le"), "NUL characters, as UTF-16 without a mark does"),
    ],
)
def test_files_that_are_not_recipes(tmp_path, raw, message):
    (tmp_path / "mine.yaml").write_bytes(raw)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "mine.yaml")


def test_numbers_are_those_of_yaml_1_2(written):
    values, _ = read_sections(
        written("a: [010, 1_000, 1e-3, 1E3, -2, .5, true, ~]\nb: [1:30, 0x10, no, 2024-01-01, '1']\n")
    )
    assert values == {
        "a": [10, 1000, 0.001, 1000.0, -2, 0.5, True, None],
        "b": ["1:30", "0x10", "no", "2024-01-01", "1"],
    }


def test_anchors_merge_and_an_explicit_key_wins(written):
    values, lines = read_sections(written("a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n"))
    assert values["b"] == {"x": 1, "y": 3}
    assert lines["b.y"] == "line 4"


def test_an_override_of_an_aliased_section_leaves_the_other(written):
    """With an alias, both sections are one object in PyYAML's result."""
    text = RECIPE.replace("optimizer:\n  lr: 1e-3\n", "optimizer: &o {lr: 1e-3}\nmoe: *o\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(written(text), ["optimizer.weight_decay=0.2"])
    assert "moe.lr" in str(error.value)
    assert "moe.weight_decay" not in str(error.value)


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "a: &x {b: *x}\n"])
def test_an_alias_inside_its_anchor_ends(written, text):
    with pytest.raises(RecipeError):
        load_recipe(written(text))


@pytest.mark.parametrize("section", ["tracking", "checkpoint", "eval", "schedule", "moe"])
@pytest.mark.parametrize("empty", ["", " ~", " {}"])
def test_an_empty_section_is_the_default_section(written, section, empty):
    assert load_recipe(written(f"{RECIPE}{section}:{empty}\n")) == load_recipe(written(RECIPE))


def test_an_override_may_fill_an_empty_section(written):
    assert load_recipe(written(RECIPE + "schedule:\n"), ["schedule.warmup=5%"]).schedule.warmup == "5%"


def test_words_that_yaml_reads_as_something_else_stay_text(written):
    text = RECIPE.replace("name: mine", "name: 2024").replace("dataset: mine", "dataset: no")
    recipe = load_recipe(written(text + "eval: {prompts: [yes, 1e5, 010, null]}\n".replace(", null", "")))
    assert (recipe.name, recipe.data.dataset, recipe.eval.prompts) == ("2024", "no", ["yes", "1e5", "010"])
    assert load_recipe(written(RECIPE), ["name=2024-01-01", "data.dataset=null"]).data.dataset == "null"
    assert load_recipe(written(RECIPE), ["schedule.decay=null"]).schedule.decay is None


def test_every_text_of_the_schema_is_known_as_one():
    def is_text(annotation):
        inner = typing.get_args(annotation)
        return annotation is str or (
            typing.get_origin(annotation) not in (typing.Literal, dict) and any(map(is_text, inner))
        )

    found = {"name"}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and name != "optimizer":
            keys = field.annotation.model_fields.items()
            found |= {f"{name}.{key}" for key, inner in keys if is_text(inner.annotation)}
    for name, section in {"data.stages": Stage, "train.distill": DistillSection, "train.mtp": MTPSection}.items():
        found |= {f"{name}.{key}" for key, inner in section.model_fields.items() if is_text(inner.annotation)}
    assert found == TEXT_KEYS | {"schedule.weight_decay"}  # its points are shares or numbers of tokens


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "inf", "nan", "1e999", "true"])
@pytest.mark.parametrize(
    "key",
    [
        *("optimizer.lr", "optimizer.weight_decay", "optimizer.betas", "train.grad_clip", "train.spike_threshold"),
        *("schedule.min_lr_ratio", "model.norm_eps", "model.init_std", "model.rope_theta", "moe.z_loss_coef"),
        *("train.tokens", "schedule.warmup", "train.batch_tokens", "model.num_layers"),
    ],
)
def test_what_is_no_finite_number_is_refused(key, number):
    value = f"[{number}, 0.9]" if key == "optimizer.betas" else number
    with pytest.raises(RecipeError, match=key):
        load_recipe("moe-demo", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer={lr: 1, lr: 2}"], "lr is given twice"),
        (["optimizer.lr=[1"], "not valid YAML"),
    ],
)
def test_an_override_that_is_no_yaml_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        load_recipe("demo", overrides)


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["train.seed=1", "train.seed=2"], "'train.seed=1' has no effect: 'train.seed=2' comes later"),
        (["schedule.warmup=1%", "schedule={name: wsd}"], "'schedule.warmup=1%' has no effect"),
    ],
)
def test_the_last_of_two_overrides_counts_and_the_other_is_named(overrides, note):
    notes = []
    recipe = load_recipe("demo", overrides, notes.append)
    assert recipe == load_recipe("demo", overrides[1:])
    assert [message for message in notes if note in message]


def test_an_override_may_change_a_key_of_a_section_given_before():
    recipe = load_recipe("demo", ["schedule={name: linear}", "schedule.warmup=5%"])
    assert (recipe.schedule.name, recipe.schedule.warmup) == ("linear", "5%")


def test_an_overrides_value_is_read_as_in_a_file():
    assert read_value("optimizer.lr", "1e-3") == 0.001
    assert read_value("eval.prompts", "[no, 1e5]") == ["no", "1e5"]
    assert read_value("eval", "{prompts: [no]}") == {"prompts": ["no"]}
    assert read_value("data.dataset", "[old") == "[old"
