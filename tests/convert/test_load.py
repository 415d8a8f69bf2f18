import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch

from lightlm import checkpoint, files
from lightlm.checkpoint import LoadedModel, model_name, write_checkpoint
from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.convert.load import find_start, load_pretrained, locate
from lightlm.errors import CheckpointError, ConvertError, RecipeError
from lightlm.model.transformer import Transformer
from lightlm.recipe import Start
from tests.shapes import SHAPES


@pytest.fixture
def workplace(tokenizer, tmp_path, monkeypatch):
    """An empty folder with two runs, of which `second` is the newest."""
    monkeypatch.chdir(tmp_path)
    for number, run in enumerate((Path("runs/first"), Path("runs/second"))):
        for step in (10, 20):
            model = _model(tokenizer, 10 * number + step)
            write_checkpoint(run, step, model.state_dict(), model.config, tokenizer)
        (run / "recipe.yaml").touch()
    files.point_to(Path("runs/latest"), "second")
    return tmp_path


def _model(tokenizer, seed):
    torch.manual_seed(seed)
    return Transformer(replace(SHAPES["llama"], vocab_size=tokenizer.vocab_size)).eval()


def same(loaded, tokenizer, seed):
    tokens = torch.arange(12)[None]
    return torch.equal(loaded.model(tokens), _model(tokenizer, seed)(tokens))


@pytest.mark.parametrize(
    ("reference", "name", "seed"),
    [
        (None, "second/step_000020", 30),
        ("runs/latest", "second/step_000020", 30),
        ("runs/first", "first/step_000020", 20),
        ("first", "first/step_000020", 20),
        (Path("first"), "first/step_000020", 20),
        ("runs/first/checkpoints/step_000010", "first/step_000010", 10),
        ("runs/first/checkpoints/latest", "first/step_000020", 20),
    ],
)
def test_runs_and_checkpoints(reference, name, seed, workplace, tokenizer):
    loaded = load_pretrained(reference)
    assert loaded.name == name
    assert same(loaded, tokenizer, seed)
    assert not loaded.model.training


@pytest.mark.parametrize("file", ["complete.json", "model.safetensors", "tokenizer.json"])
def test_a_checkpoint_pruned_while_it_is_read_gives_way_to_the_newer_one(workplace, tokenizer, monkeypatch, file):
    """`first` is being trained: at any file that is read of step 20, step 30 appears and step 20 goes."""
    run, plain = Path("runs/first"), Path.open

    def write_newer():
        monkeypatch.undo()
        monkeypatch.chdir(workplace)
        model = _model(tokenizer, 99)
        write_checkpoint(run, 30, model.state_dict(), model.config, tokenizer)
        for step in (10, 20):
            files.remove_folder(run / f"checkpoints/step_0000{step}")

    def opened(path, *args, **settings):
        if path.name == file and path.parent.name == "step_000020":
            write_newer()
        return plain(path, *args, **settings)

    monkeypatch.setattr(Path, "open", opened)
    loaded = load_pretrained("first")
    assert loaded.name == "first/step_000030"
    assert same(loaded, tokenizer, 99)


def test_a_checkpoint_that_was_named_and_is_gone_is_an_error(workplace, monkeypatch):
    path = Path("runs/first/checkpoints/step_000010")

    def pruned(folder):
        files.remove_folder(folder)
        raise FileNotFoundError(folder)

    monkeypatch.setattr(checkpoint, "load_model", pruned)
    with pytest.raises(CheckpointError, match="no model at"):
        load_pretrained(path)


def test_pointer_where_links_are_not_allowed(workplace):
    (workplace / "runs" / "latest").unlink()
    (workplace / "runs" / "latest").write_text("first")
    assert load_pretrained().name == "first/step_000020"


def test_hugging_face_folder(workplace, tokenizer):
    export_huggingface(LoadedModel(_model(tokenizer, 7), tokenizer, Path("x")), workplace / "exported")
    loaded = load_pretrained("exported", dtype=torch.bfloat16)
    assert loaded.name == "exported"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert same(load_pretrained("exported"), tokenizer, 7)


def fake_hub(monkeypatch, folder, wanted):
    """Replace the Hub by one that has a single repository."""
    asked = []

    def snapshot_download(repo_id, *, allow_patterns, etag_timeout):
        asked.append(allow_patterns)
        assert repo_id == wanted
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_id(workplace, tokenizer, monkeypatch):
    export_huggingface(LoadedModel(_model(tokenizer, 7), tokenizer, Path("x")), workplace / "cache" / "0123abcd")
    asked = fake_hub(monkeypatch, workplace / "cache" / "0123abcd", "someone/Model-1.5M")
    loaded = load_pretrained("someone/Model-1.5M")
    assert same(loaded, tokenizer, 7)
    assert loaded.name == "Model-1.5M"
    assert len(asked) == 1
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(asked[0])
    assert not any("bin" in pattern for pattern in asked[0])
    assert "vocab.txt" in asked[0]  # the whole tokenizer of some models


def test_a_model_in_the_cache_of_the_hub_has_the_name_of_its_repository(workplace):
    assert model_name(Path("hub/models--org--some-model/snapshots/0123abcd")) == "some-model"
    assert model_name(Path("runs/first/checkpoints/step_000010")) == "first/step_000010"
    assert model_name(Path("snapshots/mine")) == "mine"


def test_a_model_in_this_folder_has_the_name_that_it_has_from_outside(tmp_path, monkeypatch):
    step = tmp_path / "first" / "checkpoints" / "step_000010"
    step.mkdir(parents=True)
    (tmp_path / "first" / "recipe.yaml").write_text("name: first\n")
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    for folder, reference, name in (
        ("mine", ".", "mine"),
        ("mine/inner", "..", "mine"),
        (step, ".", "first/step_000010"),
        (tmp_path, "mine/inner/..", "mine"),
    ):
        monkeypatch.chdir(tmp_path / folder)
        assert model_name(Path(reference)) == name


def test_hub_model_with_only_pytorch_weights(workplace, tokenizer, monkeypatch):
    folder = workplace / "cache"
    export_huggingface(LoadedModel(_model(tokenizer, 7), tokenizer, Path("x")), folder)
    weights = folder / "model.safetensors"
    weights.rename(workplace / "elsewhere")
    asked = fake_hub(monkeypatch, folder, "someone/old")
    with pytest.raises(ConvertError, match="no weights"):
        load_pretrained("someone/old")
    assert len(asked) == 2
    assert "pytorch_model.bin" in asked[1]


def test_checkpoint_on_the_hub(workplace, tokenizer, monkeypatch):
    fake_hub(monkeypatch, workplace / "runs/first/checkpoints/step_000010", "someone/ours")
    assert same(load_pretrained("someone/ours"), tokenizer, 10)


def test_the_start_of_a_run_is_found_without_weights(workplace, tokenizer, monkeypatch):
    """In every form, by its config.json alone; a run is pinned to its checkpoint."""
    export_huggingface(LoadedModel(_model(tokenizer, 7), tokenizer, Path("x")), workplace / "exported")
    (workplace / "exported" / "model.safetensors").unlink()
    asked = fake_hub(monkeypatch, workplace / "exported", "someone/Model-1.5M")
    shape = _model(tokenizer, 7).config
    pinned = "runs/first/checkpoints/step_000020"
    for reference, name in {"first": pinned, "runs/first": pinned, pinned: pinned, "latest": None}.items():
        assert find_start(reference) == Start(name or "runs/second/checkpoints/step_000020", shape)
    absolute, hub_id = str(workplace / "exported"), "someone/Model-1.5M"
    for reference, name in {"exported": "./exported", absolute: absolute, hub_id: hub_id}.items():
        found = find_start(reference)
        assert (found.reference, found.model.hidden_size) == (name, shape.hidden_size)
    (patterns,) = asked
    assert "config.json" in patterns
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in patterns)
    fake_hub(monkeypatch, workplace / "exported", "openai-community/gpt2")
    assert find_start("gpt2").reference == "openai-community/gpt2"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"model_type": "lightlm"}', "config.json is damaged"),
        ('{"model_type": "bert"}', "model_type is 'bert'; LightLM reads"),
        ('{"model_type": "llama"}', "describes a model LightLM does not have"),
    ],
)
def test_a_start_that_is_no_model_is_one_message(text, problem, workplace):
    folder = workplace / ("runs/first/checkpoints/step_000020" if problem.startswith("config") else "other")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    with pytest.raises(RecipeError) as error:
        find_start(str(folder))
    assert str(error.value).startswith("train.init_from: ")
    assert problem in str(error.value)


def test_hub_out_of_reach(workplace):
    """tests/conftest.py sets HF_HUB_OFFLINE."""
    with pytest.raises(CheckpointError) as error:
        load_pretrained("HuggingFaceTB/SmolLM2-135M-of-nobody")
    for part in ("HuggingFaceTB/SmolLM2-135M-of-nobody", "Hugging Face Hub", "without a connection, name"):
        assert part in str(error.value)


@pytest.mark.parametrize("reference", ["nothing", "runs/nothing", "./some/where", "/no/such/place", "runs/a/b"])
def test_nothing_found_lists_what_was_tried(reference, workplace, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError) as error:
        load_pretrained(reference)
    for part in (str(Path(reference)), "there is no such folder", "runs here: first, second)", "ORG/NAME"):
        assert part in str(error.value)


def test_path_that_is_not_a_model(workplace):
    (workplace / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: the folder holds neither recipe\.yaml nor config\.json"):
        locate("empty")
    (workplace / "notes.txt").write_text("milk")
    with pytest.raises(CheckpointError, match="recognizes this file"):
        locate("notes.txt")


def test_no_run_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="train a model first"):
        load_pretrained()


@pytest.mark.parametrize("missing", ["config.json", checkpoint.MARKER])
def test_interrupted_checkpoint(missing, workplace):
    folder = Path("runs/first/checkpoints/step_000010")
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        load_pretrained(folder)


def test_run_skips_an_interrupted_checkpoint(workplace):
    (workplace / "runs/first/checkpoints/step_000020" / checkpoint.MARKER).unlink()
    assert load_pretrained("first").name == "first/step_000010"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", checkpoint.MARKER])
def test_a_run_falls_back_on_the_checkpoint_before_a_damaged_one(name, workplace, tokenizer, caplog):
    folder = Path("runs/second/checkpoints/step_000020")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:40] + bytes([content[40] ^ 4]) + content[41:])
    for reference in (None, "second", "runs/latest", "runs/second"):
        assert same(load_pretrained(reference), tokenizer, 20)
    (warning,) = {record.getMessage() for record in caplog.records}
    assert f"step_000020/{name} is damaged" in warning
    assert warning.endswith("step_000010 is used instead")
    assert folder.is_dir()
    with pytest.raises(CheckpointError, match=r"is damaged.*or name the run"):
        load_pretrained(folder)
    for path in Path("runs/second/checkpoints").glob("step_*/model.safetensors"):
        path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints of runs/second are damaged \("):
        load_pretrained("second")


def test_training_state_may_be_missing_where_nobody_trains(workplace, tokenizer):
    """Two thirds of a checkpoint serve only to resume."""
    run = Path("runs/first")
    model = _model(tokenizer, 5)
    path = write_checkpoint(run, 30, model.state_dict(), model.config, tokenizer, {"progress": {}})
    (path / checkpoint.TRAINING_STATE).unlink()
    assert same(load_pretrained("first"), tokenizer, 5)


def test_other_config_is_not_a_checkpoint(workplace):
    folder = Path("runs/first/checkpoints/step_000010")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ConvertError, match="'bert'"):
        load_pretrained(folder)
