"""Finetuning on the command line: from a run to another, without its model later, and one message per mistake."""

import json
import shutil
from pathlib import Path

import pytest

from lightlm.convert.huggingface.card import model_card
from lightlm.convert.load import load_pretrained
from tests.corpus import make_workspace
from tests.train.watch import start

FURTHER = """
name: further
data: {dataset: again}
train: {tokens: 1024, batch_tokens: 256, device: cpu, dtype: float32, init_from: base}
optimizer: {lr: 1e-4}
eval: {tokens: 1024, prompts: []}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a run `base`, and a recipe that starts from it on data that are not prepared."""
    folder = make_workspace(tmp_path_factory.mktemp("finetuning"), 100)
    (folder / "further.yaml").write_text(FURTHER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start("tiny.yaml", "train.tokens=2560", "eval.prompts=[]", name="base")
    return folder


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def test_from_a_run_to_another(lightlm, monkeypatch):
    lightlm("train", "further.yaml").assert_one_message(
        "There is no data folder data/again",
        "lightlm prepare-data again --tokenizer runs/base/checkpoints/step_000010",
    )
    planned = lightlm("plan", "further.yaml", "--no-probe", "--json")
    assert "--tokenizer runs/base/" in json.loads(planned.stdout)["notes"][0]
    assert json.loads(planned.stdout)["model"]["parameters"] == 28_832
    prepared = lightlm("prepare-data", "tiny.jsonl", "--tokenizer", "base", "--out", "data/again", "--json")
    assert json.loads(prepared.stdout)["vocab_size"] == 320
    again = lightlm("prepare-data", "tiny.jsonl", "--tokenizer", "runs/base", "--out", "data/again", "--json")
    assert json.loads(again.stdout)["status"] == "already prepared"
    Path("talks.jsonl").write_text('{"prompt": "Name a color", "completion": "Red"}\n' * 3, encoding="utf-8")
    chat = ("prepare-data", "talks.jsonl", "--format", "chat", "--val-fraction", "0", "--json")
    for tokenizer, begin in (("base", " train.init_from=base train.seq_len=32"), ("data/again", "")):
        talks = lightlm(*chat, "--tokenizer", tokenizer, "--out", "data/talks", "--overwrite")
        assert json.loads(talks.stdout)["next"] == f"lightlm train recipes/chat.yaml data.dataset=talks{begin}"
    verified = lightlm("prepare-data", "data/talks", "--verify", "--json")  # it knows the tokenizer by a checksum only
    assert json.loads(verified.stdout)["next"] == "lightlm train recipes/chat.yaml data.dataset=talks"
    dry = json.loads(lightlm("train", "further.yaml", "--dry-run", "--json").stdout)
    assert (dry["parameters"], dry["steps"]) == (28_832, 4)
    trained = lightlm("train", "further.yaml")
    assert "before the first step  validation" in " ".join(trained.stderr.split("\n"))
    rows = {run["name"]: run["init_from"] for run in json.loads(lightlm("runs", "ls", "--json").stdout)}
    assert rows == {"base": None, "further": "runs/base/checkpoints/step_000010"}
    assert "started from" in lightlm("runs", "ls").stdout
    assert lightlm("report", "further").code == 0
    card = model_card(load_pretrained("further"), "out", architecture="Qwen3ForCausalLM", parameters=1, license="mit")
    assert "- Finetuned from `runs/base/checkpoints/step_000010`." in card
    assert "base_model" not in card  # it is not on the Hub
    recipe = Path("runs/further/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("runs/base/checkpoints/step_000010", "HuggingFaceTB/SmolLM2-135M"))
    card = model_card(load_pretrained("further"), "out", architecture="Qwen3ForCausalLM", parameters=1, license="mit")
    assert "base_model: HuggingFaceTB/SmolLM2-135M" in card


def test_a_restarted_job_needs_the_model_no_more(lightlm):
    job = ("train", "further.yaml", "data.dataset=tiny", "--name", "job", "--auto-resume", "--json")
    assert json.loads(lightlm(*job).stdout)["step"] == 4
    shutil.move("runs/base", "away")
    try:
        assert json.loads(lightlm(*job).stdout)["step"] == 4
        lightlm("train", "further.yaml").assert_one_message("train.init_from: no model at base")
    finally:
        shutil.move("away", "runs/base")


def test_a_shipped_recipe_of_another_shape_says_what_to_do(lightlm):
    outcome = lightlm("train", "demo", "train.init_from=base", "data.dataset=tiny", "--dry-run")
    outcome.assert_one_message(
        "contradicts the model that it starts from (train.init_from: runs/base/checkpoints/step_000010)",
        "model.num_layers: 6, but 2 in the model [line ",
        "model.hidden_size: 256, but 32 in the model",
        "add model={} to the command",
    )
    small = ("data.dataset=tiny", "train.batch_tokens=256", "model={}", "--dry-run", "--json")
    assert json.loads(lightlm("train", "demo", "train.init_from=base", *small).stdout)["parameters"] == 28_832


def test_a_sweep_takes_the_shape_from_the_model_too(lightlm):
    grid = ("sweep", "further.yaml", "optimizer.lr=1e-4,1e-3", "data.dataset=tiny", "--dry-run")
    outcome = lightlm(*grid)
    assert outcome.code == 0, outcome
    lightlm(*grid, "model.num_layers=3").assert_one_message("model.num_layers: 3, but 2 in the model")


def test_a_recipe_without_a_shape_says_what_is_missing(lightlm):
    outcome = lightlm("train", "further.yaml", "train.init_from=null")
    outcome.assert_one_message("model: is missing; or train.init_from names a model to start from")


def test_the_list_of_recipes_needs_no_model(lightlm):
    rows = {row["recipe"]: row for row in json.loads(lightlm("recipes", "ls", "--json").stdout)}
    assert (rows["finetune"]["parameters"], rows["finetune"]["tokens"]) == (None, 1_000_000)
    assert "init_from: HuggingFaceTB/SmolLM2-135M" in lightlm("recipes", "show", "finetune").stdout
