"""What becomes of a file's settings that an override, or another setting, takes the effect from."""

import dataclasses

import pytest

from lightlm.errors import RecipeError
from lightlm.model.config import ModelConfig
from lightlm.recipe import load_recipe, load_run_recipe, shipped_recipes
from tests.corpus import STEADY
from tests.shapes import without_hub


@pytest.mark.parametrize(
    ("overrides", "key", "why"),
    [
        (["model.position=learned", "model.rope_theta=500000"], "model.rope_theta", "with model.position=learned"),
        (["model.full_attention_interval=4"], "model.full_attention_interval", "without model.sliding_window"),
        (["model.sliding_window=8", "model.full_attention_interval=1"], "model.sliding_window", "every layer"),
        (["model.sliding_window=256"], "model.sliding_window", "max_seq_len=256"),
        (["model.router=softmax"], "model.router", "without model.num_experts"),
        (["moe.z_loss_coef=0.1"], "moe.z_loss_coef", "without model.num_experts"),
        (["schedule.min_lr_ratio=0.1", "schedule.name=constant"], "schedule.min_lr_ratio", "name=constant"),
        (["schedule.decay=20%", "schedule.name=constant"], "schedule.decay", "schedule.name=constant"),
        (["schedule.rewarmup_from=1K"], "schedule.rewarmup_from", "without a length in schedule.rewarmup"),
        (["eval.prompts=[]", "eval.max_new_tokens=9"], "eval.max_new_tokens", "without eval.prompts"),
        (["eval.limit=9"], "eval.limit", "without eval.tasks"),
        (["tracking.project=mine"], "tracking.project", "without wandb or trackio"),
        (["tracking={backends: [tensorboard], project: mine}"], "tracking.project", "without wandb or trackio"),
        (["optimizer.ns_steps=5"], "optimizer.ns_steps", "with optimizer.name=adamw"),
    ],
)
def test_a_setting_without_effect_is_refused(overrides, key, why):
    with pytest.raises(RecipeError) as error:
        load_recipe(STEADY, overrides)
    assert f"{key}: has no effect" in str(error.value)
    assert why in str(error.value)


def test_experts_leave_no_use_for_a_dense_width_where_no_layer_is_dense():
    with pytest.raises(RecipeError, match=r"model\.intermediate_size: has no effect"):
        load_recipe("moe-demo", ["model.first_k_dense=0", "model.intermediate_size=999"])


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_no_shipped_recipe_has_a_setting_without_effect(path):
    notes = []
    load_recipe(path, note=notes.append, find_start=without_hub)
    assert notes == []


@pytest.mark.parametrize(
    ("recipe", "override", "notes"),
    [
        (STEADY, "schedule.name=cosine", ["schedule.decay 20%"]),
        (STEADY, "schedule.name=constant", ["schedule.decay 20%"]),
        (STEADY, "schedule.name=wsd", []),
        ("gpt2-124m", "schedule.name=constant", ["schedule.min_lr_ratio 0.1"]),
        ("gpt3-125m", "schedule.name=wsd", ["schedule.decay 260B"]),
        ("gpt3-125m", "model.sliding_window=0", []),
        ("moe-demo", "eval.prompts=[]", []),
    ],
)
def test_an_override_leaves_out_what_it_takes_the_effect_from(recipe, override, notes):
    found = []
    load_recipe(recipe, [override], found.append)
    assert [" ".join(note.split()[:2]) for note in found] == notes


def test_an_override_may_turn_off_experts_and_trackers(tmp_path):
    notes = []
    recipe = load_recipe("moe-demo", ["model.num_experts=0"], notes.append)
    assert recipe.model.num_experts_per_tok == ModelConfig.num_experts_per_tok
    assert any("moe.bias_update_rate" in note for note in notes)
    path = tmp_path / "mine.yaml"
    text = load_recipe("demo", ["tracking={backends: [wandb], project: mine}"]).to_yaml()
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path).tracking.project == "mine"
    assert load_recipe(path, ["tracking.backends=[]"], notes.append).tracking.project == "lightlm"
    assert "tracking.project mine" in notes[-1]


def test_an_override_that_has_no_effect_itself_is_refused():
    with pytest.raises(RecipeError, match=r"schedule\.decay_shape: has no effect"):
        load_recipe("demo", ["schedule.name=cosine", "schedule.decay_shape=sqrt"])


def test_a_decay_given_with_its_schedule_is_kept_if_the_rate_stays_above_zero():
    given = ["schedule.name=cosine", "schedule.decay=60%", "schedule.min_lr_ratio=0.1"]
    assert load_recipe(STEADY, given).schedule.decay == "60%"
    assert load_recipe(STEADY, ["schedule={name: cosine, warmup: 2%, decay: 98%}"]).schedule.decay == "98%"
    for name in ("cosine", "linear"):
        with pytest.raises(RecipeError, match=r"schedule\.decay: 20% of .* leaves the last 78% of the run at rate 0"):
            load_recipe(STEADY, [f"schedule.name={name}", "schedule.decay=20%"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  name: wsd\n", "  name: cosine\n"),  # the rate is 0 from 22% of the run on
        ("  project: lightlm\n", "  project: mine\n"),
        ("  rope_theta: 10000.0\n", "  rope_theta: 500000.0\n"),
    ],
)
def test_the_recipe_of_an_earlier_run_keeps_its_meaning(tmp_path, old, new):
    """Earlier versions wrote these into a run; a new recipe with them is refused."""
    text = load_recipe("gpt3-125m", ["schedule={name: wsd, decay: 20%}"], lambda _: None).to_yaml()
    text = text.replace("tracking:\n  backends: []\n", "tracking:\n  backends: []\n  project: lightlm\n")
    assert old in text
    text = text.replace("  decay_shape: linear\n", "").replace(old, new)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = load_run_recipe(tmp_path)
    assert recipe.schedule.decay == "20%"
    assert recipe.schedule.name == ("cosine" if "cosine" in new else "wsd")
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")  # as a resumed run does
    assert load_run_recipe(tmp_path).to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_spans_that_exceed_a_shorter_run_name_the_shares_that_fit(path):
    try:
        load_recipe(path, ["train.tokens=300M"], find_start=without_hub)
    except RecipeError as error:
        advice = str(error).rpartition("; write ")[2].partition("  [")[0].split()
        assert advice
        load_recipe(path, ["train.tokens=300M", *advice])
    else:
        assert path.stem not in ("gpt2-124m", "gpt3-125m")


def test_every_field_of_a_model_has_an_effect_or_is_known_to_have_none():
    dense = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, max_seq_len=32)
    assert set(dense.idle()) <= {field.name for field in dataclasses.fields(ModelConfig)}
    assert dense.idle_given() == []


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model.dropout=0.1", "did you mean train.dropout?"),
        ("model.dropouts=0.1", "valid are num_layers"),
        ("train.hats=3", "valid are tokens"),
        ("model.heads=3", "did you mean model.num_heads?"),
        ("train.batch=3", "did you mean train.batch_tokens?"),
        ("optimizer.learning_rate=3", "did you mean optimizer.lr?"),
        ("train.max_steps=3", "train.tokens is the length of a run"),
        ("train.warmup=3", "did you mean schedule.warmup?"),
        ("schedule.warm_up=3", "did you mean schedule.warmup?"),
    ],
)
def test_a_guess_is_offered_only_for_what_resembles_the_key(override, hint):
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", [override])
    assert hint in str(error.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"is a folder, not a recipe$"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match="resume it with `lightlm train --resume"):
        load_recipe(tmp_path)
