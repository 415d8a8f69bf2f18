"""The section `model` of a recipe that starts from a model: left out, equal, or refused by key."""

from dataclasses import replace

import pytest

from lightlm.errors import RecipeError
from lightlm.model.config import ModelConfig
from lightlm.recipe import Start, load_recipe, load_run_recipe, recipe_name, shipped_recipes
from tests.shapes import SHAPES

GIVEN = """
name: further
data: {dataset: tiny}
train: {tokens: 5120, batch_tokens: 256, seq_len: 32, init_from: somewhere}
optimizer: {lr: 1e-4}
"""
SHAPE = replace(SHAPES["llama"], vocab_size=320).resolved()


def load(tmp_path, text, *overrides, shape=SHAPE):
    path = tmp_path / "further.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides, lambda _: None, lambda reference, _: Start(f"{reference}/step_7", shape))


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_is_taken_from_the_model(name, tmp_path):
    shape = SHAPES[name].resolved()
    recipe = load(tmp_path, GIVEN, shape=shape)
    assert recipe.model.resolved() == shape
    assert recipe.train.init_from == "somewhere/step_7"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_run_recipe(tmp_path)  # which never looks for the model
    assert again.to_yaml() == recipe.to_yaml()
    repeated = load(tmp_path, recipe.to_yaml(), "train.init_from=somewhere", shape=shape)
    assert repeated.to_yaml() == recipe.to_yaml()


def test_values_that_mean_the_same_are_accepted(tmp_path):
    same = "model: {num_layers: 2, head_dim: 0, vocab_size: 0, num_kv_heads: 2, norm_eps: 9.999999747378752e-06}"
    assert load(tmp_path, GIVEN + same).model.resolved() == SHAPE


def test_a_run_may_train_on_longer_texts_where_positions_rotate(tmp_path):
    recipe = load(tmp_path, f"{GIVEN}model: {{max_seq_len: 4096, rope_theta: 500000}}")
    assert recipe.model.resolved() == replace(SHAPE, max_seq_len=4096, rope_theta=500_000)
    with pytest.raises(RecipeError, match=r"model\.max_seq_len: 4096, but 48 in the model"):
        load(tmp_path, GIVEN + "model: {max_seq_len: 4096}", shape=SHAPES["gpt2"].resolved())


def test_llama3_scaling_counts_from_the_length_that_the_model_was_trained_with(tmp_path):
    longer = "model: {max_seq_len: 4096, rope_scaling: llama3, rope_factor: 4"
    recipe = load(tmp_path, f"{GIVEN}{longer}}}")
    assert recipe.model.resolved().rope_original_seq_len == SHAPE.max_seq_len == 48
    assert load(tmp_path, f"{GIVEN}{longer}, rope_original_seq_len: 32}}").model.rope_original_seq_len == 32
    scaled = replace(SHAPE, rope_scaling="llama3", rope_factor=2.0, rope_original_seq_len=16).resolved()
    assert load(tmp_path, f"{GIVEN}{longer}}}", shape=scaled).model.rope_original_seq_len == 16


def test_all_contradictions_are_named_at_once_with_their_places(tmp_path):
    with pytest.raises(RecipeError) as error:
        load(tmp_path, GIVEN + "model:\n  num_layers: 3\n  norm: layernorm\n  num_kv_heads: 0", "model.qk_norm=true")
    message = str(error.value)
    assert "train.init_from: somewhere" in message
    assert "model.num_layers: 3, but 2 in the model  [line 7]" in message
    assert "model.norm: 'layernorm', but 'rmsnorm' in the model  [line 8]" in message
    assert "model.num_kv_heads: 0, but 2 in the model  [line 9]" in message
    assert "model.qk_norm: True, but False in the model  [override model.qk_norm=true]" in message
    assert "model={}" in message
    assert load(tmp_path, GIVEN + "model:\n  num_layers: 3", "model={}").model.resolved() == SHAPE


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_every_shipped_recipe_can_start_from_a_model(path):
    overrides = ["train.init_from=there", "model={}", "train.seq_len=32", "moe={}"]
    recipe = load_recipe(path, overrides, lambda _: None, lambda reference, _: Start(reference, SHAPE))
    assert recipe.model.resolved() == SHAPE


@pytest.mark.parametrize(
    ("section", "override", "message"),
    [
        ("model: {num_layer: 3}", "", "model.num_layer: unknown key; did you mean model.num_layers?"),
        ("model: 3", "", "model: should be a section"),
        ("model: {num_layers: x}", "", "model.num_layers: 'x', but 2 in the model"),
        ("", "train.seq_len=64", "train.seq_len: 64 exceeds model.max_seq_len 48"),
        ("", "train.init_from=", "model: is missing; or train.init_from names a model"),
    ],
)
def test_mistakes_keep_their_messages(section, override, message, tmp_path):
    with pytest.raises(RecipeError) as error:
        load(tmp_path, GIVEN + section, *filter(None, [override]))
    assert message in str(error.value)


def test_the_name_is_read_without_the_model(tmp_path):
    (tmp_path / "further.yaml").write_text(GIVEN, encoding="utf-8")
    assert recipe_name(tmp_path / "further.yaml") == "further"
    assert recipe_name(tmp_path / "further.yaml", ["name=other"]) == "other"
    with pytest.raises(RecipeError, match="name: string should match pattern"):
        recipe_name(tmp_path / "further.yaml", ["name=a/b"])


def test_a_model_of_experts_without_dense_layers_is_taken_as_it_is(tmp_path):
    """Its config.json has the width of dense layers, which a recipe may not give."""
    shape = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        max_seq_len=48,
        vocab_size=97,
        num_experts=4,
        moe_intermediate_size=16,
    ).resolved()
    assert load(tmp_path, GIVEN, shape=shape).model.resolved() == shape
