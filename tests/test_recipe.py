import dataclasses
import math
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml

from lightlm.convert.formats import FORMATS
from lightlm.errors import RecipeError, UsageError
from lightlm.model.transformer import Transformer
from lightlm.recipe import CheckpointSection, load_recipe, load_run_recipe, shipped_recipes, span_tokens
from tests.corpus import STEADY
from tests.shapes import without_hub

PARAMETERS = {
    "chat": 134_515_008,  # SmolLM2-135M's
    "chat-demo": 191_040,
    "deepseek-demo": 12_516_992,
    "deepseek-mini": 142_901_760,
    "demo": 6_849_036,
    "finetune": 134_515_008,  # SmolLM2-135M's
    "gpt2-124m": 124_439_808,
    "gpt3-125m": 125_226_240,
    "lightlm": 135_155_328,
    "lightlm-30m": 29_898_240,
    "mobilellm-125m": 124_635_456,
    "mobilellm-ls-125m": 124_635_456,
    "moe": 144_952_064,
    "moe-demo": 12_738_560,
    "speedrun": 4_722_880,
}
VOCABULARY = {
    "chat-demo": 470,
    "deepseek-demo": 8192,
    "deepseek-mini": 50_257,
    "demo": 8192,
    "moe-demo": 8192,
    "lightlm": 50_257,
    "lightlm-30m": 16_384,
    "moe": 50_257,
    "speedrun": 8192,
}  # where the recipe leaves it to the data


def mistakes(tmp_path, text, overrides=()):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def test_every_shipped_recipe_is_known_here():
    assert {path.stem for path in shipped_recipes()} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_builds_its_parameter_count_and_opens_with_its_commands(name):
    recipe = load_recipe(name, find_start=without_hub)
    config = dataclasses.replace(recipe.model, vocab_size=recipe.model.vocab_size or VOCABULARY[name])
    with torch.device("meta"):
        model = Transformer(config)
    assert model.num_parameters()["total"] == PARAMETERS[name] < 150_000_000
    head = next(path for path in shipped_recipes() if path.stem == name).read_text(encoding="utf-8").splitlines()[:10]
    assert any("lightlm prepare-data" in line for line in head)
    commands = [line.split("  #")[0].split(" --")[0].rstrip() for line in head]
    assert f"#   lightlm train recipes/{name}.yaml" in commands


@pytest.mark.parametrize("name", ["lightlm", "moe"])
def test_the_stages_in_a_recipes_comment_change_the_data_where_the_decay_begins(name):
    text = next(path for path in shipped_recipes() if path.stem == name).read_text(encoding="utf-8")
    [command] = [line for line in text.splitlines() if "data.stages=" in line]
    guide = shipped_recipes()[0].parents[1] / "docs" / "guides" / "data.md"
    *_, override = shlex.split(command)
    assert f"data.stages='{override.partition('=')[2]}'" in guide.read_text(encoding="utf-8")
    staged, plain = load_recipe(name, [override]), load_recipe(name)
    assert staged.model_copy(update={"data": plain.data}) == plain
    tokens = plain.train.tokens
    [(until, first), (_, last)] = staged.data.parts
    assert span_tokens(until, tokens) == tokens - span_tokens(plain.schedule.decay, tokens)
    assert first == {"fineweb-edu": 1.0}
    assert sum(last.values()) == 100
    assert staged.data.main == "fineweb-edu"  # heldout stays what it is without stages


def test_deepseek_mini_stays_below_150m_in_training_and_its_caches_are_small():
    recipe = load_recipe("deepseek-mini")
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(recipe.model, vocab_size=50_257), recipe.train.mtp.depth)
    assert model.num_parameters() == {"total": 142_901_760, "active": 79_200_768, "embedding": 25_731_584}
    assert model.num_parameters()["total"] + model.mtp_parameters == 147_647_616 < 150_000_000
    of_mini, of_moe, of_demo, of_moe_demo = (
        2 * load_recipe(name).model.resolved().depth * math.prod(load_recipe(name).model.resolved().cached_shape)
        for name in ("deepseek-mini", "moe", "deepseek-demo", "moe-demo")
    )  # bytes per token in bf16
    assert (of_mini, of_moe, of_demo, of_moe_demo) == (8960, 15_360, 960, 3072)


@pytest.mark.parametrize("name", ["deepseek-mini", "deepseek-demo"])
def test_deepseek_recipes_export(name):
    config = dataclasses.replace(load_recipe(name).model, vocab_size=8192).resolved()
    assert FORMATS["hf"].target(config) == "DeepseekV3ForCausalLM"
    assert not FORMATS["gguf"].refusal(config)


def test_resolved_recipe_reads_back_the_same(tmp_path):
    recipe = load_recipe("gpt3-125m", ["optimizer.lr=1e-3", "train.tokens=270B"])
    assert recipe.optimizer.lr == 0.001
    assert recipe.train.tokens == 270_000_000_000
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    "override",
    [
        "schedule={name: constant}",
        "schedule={name: linear, batch_warmup: 10%, batch_start: 1K}",
        "optimizer={name: muon, lr: 0.01, cautious: true, embedding_lr: 0.1, ns_steps: 6}",
    ],
)
def test_a_resolved_recipe_holds_only_what_has_an_effect(tmp_path, override):
    """So a run with it can be resumed: what is refused in a recipe is not written into one."""
    recipe = load_recipe("demo", [override])
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert ("decay_shape" in recipe.to_dict()["schedule"]) == (recipe.schedule.name == "wsd")
    assert ("ns_steps" in recipe.to_dict()["optimizer"]) == (recipe.optimizer.name == "muon")


def test_batch_quantities_are_binary_and_token_counts_decimal():
    recipe = load_recipe("gpt2-124m")
    assert recipe.train.batch_tokens == 2**19
    assert recipe.train.tokens == 40_000_000_000
    assert recipe.batch_sequences == 512


def test_all_mistakes_are_reported_at_once_with_key_line_and_nearest(tmp_path):
    message = mistakes(
        tmp_path,
        """
name: demo
model: {num_layer: 8, hidden_size: abc, num_heads: 8, max_seq_len: 256, norm: rms}
data: {dataset: pydocs}
train:
  tokens: 3X
  batch_tokens: 16K
  lr: 1e-3
  micro_batch_size: 0
optimizer: {lr: fast}
schedule: {warmup: 80%, decay: 30%}
evals: {}
""",
        ["train.dtype=bf16"],
    )
    assert message.startswith("11 mistakes in ")
    for expected in (
        r"model.num_layers: is missing  \[line 3\]",
        r"model.num_layer: unknown key; did you mean model.num_layers\?  \[line 3\]",
        r"model.hidden_size: should be a valid integer, not 'abc'",
        r"model.norm: should be 'rmsnorm' or 'layernorm', not 'rms'; did you mean rmsnorm\?",
        r"train.tokens: write a whole number such as .* not '3X'  \[line 6\]",
        r"train.lr: unknown key; did you mean optimizer.lr\?  \[line 8\]",
        r"train.micro_batch_size: should be 'auto', not 0; or should be greater than or equal to 1",
        r"train.dtype: should be 'auto', 'bfloat16', 'float16' or 'float32', not 'bf16'; did you mean bfloat16\?  "
        r"\[override train.dtype=bf16\]",
        r"optimizer.lr: should be a valid number, not 'fast'  \[line 10\]",
        r"schedule.decay: warmup 80% and decay 30% exceed the run",
        r"evals: unknown key; did you mean eval\?  \[line 12\]",
    ):
        assert re.search(expected, message), expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_tokens=1000", "1000 is not a whole number of 256-token sequences; nearest: 1024"),
        ("train.micro_batch_size=7", "7 does not divide the 16 sequences"),
        ("train.seq_len=512", "512 exceeds model.max_seq_len 256"),
        ("model.num_kv_heads=3", "3 does not divide num_heads 4"),
        ("train.tokens=0", "train.tokens: should be greater than or equal to 1, not 0"),
        ("train.tokens=1e400", "write a whole number"),
        ("train.tokens=1.5", "train.tokens: 1.5 is not a whole number  ["),
        ("train=3", "train: should be a section with keys of its own, not 3"),
        ("train.seed=99999999999999999999", "train.seed: should be less than 9223372036854775808"),
        ("schedule.warmup=0.02", "schedule.warmup: write a share of the run such as 2%"),
        ("schedule.warmup=2M", "schedule.warmup: warmup 2M and decay 20% exceed"),
        (
            "tracking.backends=[wanbd]",
            "tracking.backends.0: should be 'tensorboard', 'wandb' or 'trackio', not 'wanbd'; did you mean wandb?",
        ),
        ("tracking.project=a/b", "tracking.project: string should match pattern"),
        ("eval.tasks_every=1M", "eval.tasks_every: has no effect without eval.tasks"),
        ("train.spike_threshold=0", "train.spike_threshold: should be greater than 0"),
        ("schedule={name: constant, decay: 20%}", "has no effect with schedule.name=constant"),
        ("schedule={name: cosine, decay_shape: sqrt}", "decay_shape: has no effect with schedule.name=cosine"),
        ("schedule={decay: 0%, min_lr_ratio: 0.1}", "min_lr_ratio: has no effect with schedule.decay=0%"),
        ("train.mtp={depth: 1, weight: 0.7, anneal: 0%}", "weight: has no effect with train.mtp.anneal=0%"),
        ("schedule={warmup: 90%}", "schedule.warmup: warmup 90% and decay 20% exceed"),
        ("schedule.batch_start=1K", "schedule.batch_start: has no effect without schedule.batch_warmup"),
        ("schedule.batch_warmup=10%", "schedule.batch_start: is missing: batch_warmup 10% needs a first batch"),
        ("schedule={batch_warmup: 10%, batch_start: 768}", "768 must be smaller than train.batch_tokens 4096, divide"),
        ("schedule={batch_warmup: 10%, batch_start: 900}", "whole number of 256-token sequences; nearest: 1024"),
        ("schedule={batch_warmup: 10%, batch_start: 4K}", "4096 must be smaller than train.batch_tokens 4096"),
        (
            "schedule={batch_warmup: 2M, batch_start: 1K}",
            "schedule.batch_warmup: 2M exceeds the run's 1,500,000 tokens",
        ),
        ("optimizer.momentum=0.95", "optimizer.momentum: has no effect with optimizer.name=adamw; leave it out"),
        (
            "optimizer={lr: 1, weight_decay: 0, cautious: true}",
            "optimizer.cautious: has no effect without weight_decay",
        ),
        (
            "optimizer.multiplier_weight_decay=0.01",
            "optimizer.multiplier_weight_decay: has no effect without model.multipliers",
        ),
        ("model.residual_scale=-1", "model.residual_scale: must be null or a number of at least 0, is -1"),
        ("optimizer.head_lr=1e-3", "optimizer.head_lr: has no effect with model.tie_embeddings; embedding_lr is"),
        (
            "optimizer={name: muon, lr: 0.02, update_scale: original, embedding_lr: 1e-3}",
            "optimizer.scalar_lr: is missing: with update_scale=original lr 0.02 is not a rate for AdamW",
        ),
        ("optimizer.name=adam", "optimizer.name: should be 'adamw', 'muon' or 'normuon', not 'adam'"),
        ("name=../escape", "name: string should match pattern"),
        ("model=[1]", "model: "),
    ],
)
def test_settings_that_cannot_work_are_refused(override, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(STEADY, [override])


def test_the_settings_of_an_unknown_optimizer_are_checked_as_far_as_they_can_be():
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", ["optimizer={name: muno, lr: fast, momentum: 0.9, momentun: 0.9}"])
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "optimizer.name", "optimizer.lr", "optimizer.momentun",
    ]  # fmt: skip
    assert "did you mean muon?" in lines[1]
    assert "did you mean optimizer.momentum?" in lines[3]


@pytest.mark.parametrize("key", ["train.foo", "model.foo", "model.activation", "foo"])
def test_a_name_that_resembles_no_key_lists_the_valid_ones(key):
    valid = {"train": "tokens, batch_tokens", "model": "num_layers, hidden_size", "foo": "name, model"}
    with pytest.raises(RecipeError, match=rf"{key}: unknown key; valid are {valid[key.partition('.')[0]]}") as error:
        load_recipe("demo", [f"{key}=1"])
    names = str(error.value).partition("valid are ")[2].partition("  [")[0].split(", ")
    assert not any("." in name for name in names)


def test_reading_a_recipe_does_not_import_torch():
    code = "import sys; from lightlm.recipe import load_recipe; load_recipe('demo'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("override", ["train.seed", "=3", "train..seed=1", "optimizer.lr=[1"])
def test_malformed_overrides_are_usage_errors(override):
    with pytest.raises(UsageError):
        load_recipe("demo", [override])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("schedule.final_lr=0.1", "schedule.min_lr_ratio"),
        ("moe.balance_loss=0.1", "moe.balance_loss_coef"),
        ("moe.z_loss=0.1", "moe.z_loss_coef"),
        ("train.micro_batch=4", "train.micro_batch_size"),
        ("model.full_attention_every=2", "model.full_attention_interval"),
        ("model.block_repeats=2", "model.layer_sharing"),
    ],
)
def test_a_renamed_key_says_its_new_name(old, new):
    with pytest.raises(RecipeError, match=re.escape(f"{old.partition('=')[0]}: renamed to {new}")):
        load_recipe("demo", [old])


def test_the_recipe_of_an_earlier_run_is_read_under_its_old_names(tmp_path):
    old = load_recipe("demo", ["schedule.min_lr_ratio=0.1", "model.layer_sharing=2"])
    text = old.to_yaml().replace("min_lr_ratio", "final_lr").replace("layer_sharing", "block_repeats")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_run_recipe(tmp_path) == old


def test_a_section_without_keys_takes_its_defaults():
    assert load_recipe("demo", ["checkpoint="]).checkpoint == CheckpointSection()


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean mobilellm-125m"):
        load_recipe("recipes/mobilelm-125m.yaml")


@pytest.mark.parametrize("text", ["just text", "- a\n- b", "a: [1", "name: x\n", "1: 2\n", ""])
def test_files_that_are_not_recipes_are_refused(tmp_path, text):
    mistakes(tmp_path, text)


def test_a_path_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(load_recipe("demo").to_yaml()) | {"name": "mine"}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_recipe("demo.yaml").name == "mine"
    assert load_recipe("demo").name == "demo"


def test_spans_are_shares_or_tokens():
    assert span_tokens("2.5%", 1000) == 25
    assert span_tokens("375M", 1000) == 375_000_000
    for bad in ("120%", "x%", "-1"):
        with pytest.raises(ValueError, match="write a"):
            span_tokens(bad, 10)


@pytest.mark.parametrize("written", ["mine", "mine.yml", "mine.json"])
def test_a_recipe_named_without_its_ending_is_suggested(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"did you mean mine\.yaml\?"):
        load_recipe(written)
