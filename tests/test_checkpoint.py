import json
import re

import pytest
import torch

from lightlm import checkpoint, files
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import CheckpointError
from lightlm.runs import find_run
from tests.corpus import texts
from tests.shapes import SHAPES, build


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(texts(50), 320)


@pytest.fixture
def saved(tmp_path, tokenizer):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: one\n")
    model = build("qwen3")
    return checkpoint.write_checkpoint(run, 5, model.state_dict(), model.config, tokenizer)


def rewrite_marker(folder):
    """As if the files had been written like this."""
    marker = json.loads((folder / checkpoint.MARKER).read_text())
    for name, entry in marker["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "xxh3": files.checksum(folder / name)}
    (folder / checkpoint.MARKER).write_text(json.dumps(marker))


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_reads_back_the_same(tmp_path, tokenizer, name):
    model = build(name)
    checkpoint.save_model(tmp_path / "model", model, tokenizer)
    loaded = checkpoint.load_model(tmp_path / "model")
    assert loaded.model.config == model.config
    assert not loaded.model.training
    tokens = torch.randint(97, (2, 9))
    assert torch.equal(loaded.model(tokens), model(tokens))
    assert loaded.tokenizer.sha256 == tokenizer.sha256


def test_a_checkpoint_of_an_earlier_version_loads_under_its_old_field_names(tmp_path, tokenizer):
    model = build("shared")
    checkpoint.save_model(tmp_path / "model", model, tokenizer)
    path = tmp_path / "model" / "config.json"
    text = path.read_text().replace("layer_sharing", "block_repeats")
    path.write_text(text.replace("full_attention_interval", "full_attention_every"))
    rewrite_marker(tmp_path / "model")
    assert checkpoint.load_model(tmp_path / "model").model.config == model.config


def test_wrapper_prefixes_never_reach_a_file(tmp_path, tokenizer):
    """DistributedDataParallel and torch.compile rename every parameter."""
    model = build("llama")
    compiled = torch.compile(torch.nn.Sequential(model))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"_orig_mod.module.{name}": tensor for name, tensor in model.state_dict().items()}
    assert checkpoint.clean_state(state).keys() == model.state_dict().keys()
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())


def test_a_folder_without_its_marker_is_not_a_checkpoint(saved):
    (saved / checkpoint.MARKER).unlink()
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint.*complete.json is missing"):
        checkpoint.load_model(saved)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        checkpoint.newest_checkpoint(saved.parent.parent)


def test_truncated_and_missing_files_are_named(saved):
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors is damaged.*{len(content)} bytes.*{len(content) - 10}"
    ):
        checkpoint.load_model(saved)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="its checksum is not the one"):
        checkpoint.load_model(saved)
    weights.unlink()
    with pytest.raises(CheckpointError, match="the file is missing"):
        checkpoint.load_model(saved)
    (saved / checkpoint.MARKER).write_text("")
    with pytest.raises(CheckpointError, match=r"complete.json is damaged"):
        checkpoint.load_model(saved)
    (saved / checkpoint.MARKER).write_text(json.dumps({"files": {"model.safetensors": {"bytes": 1}}}))
    with pytest.raises(CheckpointError, match=r"complete.json is damaged: it is not a list"):
        checkpoint.load_model(saved)
    (saved / checkpoint.MARKER).write_text(json.dumps({"files": {}}))
    with pytest.raises(CheckpointError, match=r"complete.json is damaged: it does not list model.safetensors"):
        checkpoint.load_model(saved)


def test_weights_of_another_shape_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["model"] |= {"num_layers": 3, "hidden_size": 64}
    (saved / "config.json").write_text(json.dumps(config))
    rewrite_marker(saved)
    with pytest.raises(CheckpointError, match=r"do not fit its configuration: blocks.2.* is missing.* and \d+ more"):
        checkpoint.load_model(saved)


def test_a_key_of_a_later_version_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["model"]["flux"] = 1
    (saved / "config.json").write_text(json.dumps(config))
    rewrite_marker(saved)
    with pytest.raises(CheckpointError, match="unknown keys flux"):
        checkpoint.load_model(saved)


def test_runs_and_checkpoints_are_found(saved, monkeypatch, tmp_path, tokenizer):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="leads to no run; name one of these: one"):
        find_run()
    run = find_run("one")
    assert find_run("runs/one") == run
    model = build("qwen3")
    newer = checkpoint.write_checkpoint(run, 1_000_000, model.state_dict(), model.config, tokenizer)
    (run / "checkpoints" / "step_2000000").mkdir()  # no marker
    assert checkpoint.newest_checkpoint(run) == newer
    assert (run / "checkpoints/latest").resolve() == newer.resolve()
    with pytest.raises(CheckpointError, match=r"no run at two.*runs here: one"):
        find_run("two")
    (tmp_path / "runs" / ".one.old").mkdir()
    (tmp_path / "runs" / ".one.old" / "recipe.yaml").touch()
    for folder in ("runs", "."):
        with pytest.raises(CheckpointError, match=rf"no run at {re.escape(folder)}: .* such as runs.one$"):
            find_run(folder)
    assert checkpoint.load_model(newer).name == "one/step_1000000"
