"""Each mistake a user can make gets one message that says what, where and what to do, and a non-zero exit."""

import json
import shutil

import pytest

from lightlm.data.tokenizer import train_tokenizer
from tests.cli.runner import Runner
from tests.corpus import TINY_RECIPE, make_workspace, texts


@pytest.fixture
def lightlm(monkeypatch, capsys):
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with data, a recipe, and a finished run."""
    folder = tmp_path_factory.mktemp("pristine")
    make_workspace(folder, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from lightlm.recipe import load_recipe
        from tests.train.watch import Recorder, make_trainer

        recipe = load_recipe("tiny.yaml", ["train.tokens=512"])
        make_trainer(recipe, "tiny", Recorder()).train()
    return folder


@pytest.fixture
def workspace(pristine, tmp_path, monkeypatch):
    """A copy to damage."""
    folder = tmp_path / "workspace"
    shutil.copytree(pristine, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def test_unknown_recipe_key(lightlm, workspace):
    lightlm("train", "tiny.yaml", "model.num_layer=3").assert_one_message(
        "model.num_layer: unknown key; did you mean model.num_layers?", "override model.num_layer=3"
    )


def test_wrong_type(lightlm, workspace):
    text = TINY_RECIPE.replace("lr: 1e-2", "lr: high")
    (workspace / "wrong.yaml").write_text(text, encoding="utf-8")
    lightlm("train", "wrong.yaml").assert_one_message("wrong.yaml", "optimizer.lr", "valid number", "'high'", "line 6")


def test_missing_data_folder(lightlm, workspace):
    lightlm("train", "tiny.yaml", "data.dataset=pydocs").assert_one_message(
        "data/pydocs", "lightlm prepare-data pydocs"
    )


def test_tokenizer_that_is_not_the_datas(lightlm, workspace):
    train_tokenizer(texts(50, seed=9), 330).save(workspace / "data/tiny/tokenizer.json")
    lightlm("train", "tiny.yaml").assert_one_message("data/tiny", "tokenizer.json")


def test_vocabulary_that_does_not_fit_the_data(lightlm, workspace):
    lightlm("train", "tiny.yaml", "model.vocab_size=200").assert_one_message("model.vocab_size 200", "320 entries")


def test_truncated_shard(lightlm, workspace):
    shard = workspace / "data/tiny/train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    lightlm("train", "tiny.yaml").assert_one_message("train_000000.bin", "bytes")


def test_checkpoint_without_marker(lightlm, workspace):
    checkpoint = "runs/tiny/checkpoints/step_000002"
    (workspace / checkpoint / "complete.json").unlink()
    lightlm("generate", "The", "--checkpoint", checkpoint).assert_one_message(checkpoint, "complete.json is missing")


def test_empty_text_source(lightlm, workspace):
    (workspace / "empty").mkdir()
    (workspace / "empty/nothing.txt").write_text(" \n")
    lightlm("prepare-data", "empty", "--tokenizer", "train:300").assert_one_message("empty")
    assert not (workspace / "data/empty").exists()


def test_prompt_longer_than_the_context(lightlm, workspace):
    outcome = lightlm("generate", "The old clock watches the sea. " * 20)
    outcome.assert_one_message("32")


def test_unknown_task(lightlm, workspace):
    lightlm("eval", "--tasks", "helaswag").assert_one_message("helaswag", "hellaswag")


def test_no_checkpoint_yet(lightlm, workspace):
    shutil.rmtree(workspace / "runs/tiny/checkpoints")
    for command in (["generate", "The"], ["eval", "--tasks", "heldout"], ["convert"]):
        lightlm(*command).assert_one_message("no checkpoint yet", "runs/tiny")


def test_no_run_yet(lightlm, workspace):
    shutil.rmtree(workspace / "runs")
    for command in (["generate", "The"], ["eval", "--tasks", "heldout"], ["convert"], ["train", "--resume"]):
        lightlm(*command).assert_one_message("no run yet", "lightlm train")


def test_damaged_weights(lightlm, workspace):
    weights = workspace / "runs/tiny/checkpoints/step_000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    lightlm("convert").assert_one_message("model.safetensors is damaged")
    assert not (workspace / "runs/tiny/hf").exists()


def test_missing_text_column_names_those_there_are(lightlm, workspace):
    (workspace / "columns.jsonl").write_text(json.dumps({"body": "text", "id": 1}) + "\n")
    lightlm("prepare-data", "columns.jsonl", "--tokenizer", "train:300").assert_one_message("text", "body")


def test_without_a_network_one_message_says_what_works(lightlm, workspace):
    lightlm("prepare-data", "fineweb-edu").assert_one_message("fineweb-edu", "lightlm prepare-data pydocs")
