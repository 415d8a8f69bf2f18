"""Runs that start from a model's weights: which weights, on which data, resumed, killed, in many processes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.convert.load import find_start, load_pretrained
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.errors import DataError, RecipeError
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.train.observe.metrics import read_metrics
from tests.convert.models import difference, edit, roughen, write
from tests.corpus import make_workspace, write_jsonl
from tests.train.group import run_together, together, train_together
from tests.train.watch import Recorder, comparable, make_trainer, resume, start

FURTHER = """
name: further
data: {dataset: tiny}
train: {tokens: 5120, batch_tokens: 256, micro_batch_size: 2, device: cpu, dtype: float32, init_from: base}
optimizer: {name: adamw, lr: 1e-3}
schedule: {name: linear, warmup: 10%}
eval: {every: 2560, tokens: 1024, prompts: []}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a trained run `base`, and a recipe that starts from it."""
    folder = make_workspace(tmp_path_factory.mktemp("initial"))
    (folder / "further.yaml").write_text(FURTHER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start(name="base")
    return folder


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def further(*overrides):
    return load_recipe("further.yaml", overrides, find_start=find_start)


def train(name, *overrides, watch=None):
    watch = watch or Recorder()
    return make_trainer(further(*overrides), name, watch).train(), watch


def weights(run):
    return load_file(checkpoint.newest_checkpoint(RUNS / run) / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(workspace):
    """The metrics of an uninterrupted run from `base`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return train("whole")[1].metrics


def test_it_starts_with_the_models_loss_and_a_schedule_of_its_own(whole):
    base = read_metrics(RUNS / "base")
    first, *steps = whole
    assert first == {"step": 0, "tokens": 0, "val_loss": base[-1]["val_loss"], "val_bpb": base[-1]["val_bpb"]}
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert steps[0]["lr"] == pytest.approx(1e-3 / 4)  # the middle of the first batch of a warmup over two
    assert steps[-1]["val_loss"] < first["val_loss"]
    assert comparable(read_metrics(RUNS / "whole")) == comparable(whole)


def test_the_recipe_of_the_run_names_the_checkpoint(whole):
    recipe = (RUNS / "whole" / "recipe.yaml").read_text(encoding="utf-8")
    assert "init_from: runs/base/checkpoints/step_000020" in recipe
    assert "vocab_size: 320" in recipe


def test_a_run_with_the_same_seed_and_no_model_starts_elsewhere():
    assert make_trainer(load_recipe("tiny.yaml"), "fresh", Recorder()).setup.resumed_from is None
    loss = start(name="random")[1].metrics[0]["loss"]
    assert loss > 5.5  # ln(320) is 5.77


@pytest.mark.parametrize("stop", [0, 7])
def test_a_stopped_run_resumes_exactly_without_the_model(whole, stop, monkeypatch):
    """Also where the signal comes within the validation before the first step."""
    name = f"stopped-{stop}"
    before = train(name, watch=Recorder(terminate_at=stop))[1].metrics
    assert before[-1]["step"] == stop
    shutil.move("runs/base", "away")
    try:
        after = resume(name)[1].metrics
    finally:
        shutil.move("away", "runs/base")
    assert comparable((before if stop else []) + after) == comparable(whole)
    assert comparable(read_metrics(RUNS / name)) == comparable(whole)
    assert_same_weights(name, "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_same_weights(whole):
    """Also if the model it started from has been trained further since."""
    shutil.copytree("runs/whole", "runs/killed", ignore=shutil.ignore_patterns("step_*", "latest"))
    shutil.copytree("runs/base", "base-before", symlinks=True)
    resume("base", "train.tokens=5632")
    resume("killed")
    shutil.rmtree("runs/base")
    shutil.move("base-before", "runs/base")
    assert comparable(read_metrics(RUNS / "killed")) == comparable(whole)


def test_a_resumed_run_cannot_start_from_another_model(whole):
    with pytest.raises(RecipeError, match=r"train\.init_from cannot change in a resumed run"):
        resume("whole", "train.init_from=elsewhere")


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does_and_resume_it(whole, parallel):
    name = f"two-{parallel}"
    metrics = together(2, run_together, further, name, f"train.parallel={parallel}", "train.tokens=2560")[0]
    longer = together(2, train_together, name, ("train.tokens=5120", "schedule.name=linear"), None, 0, True)[0][0]
    assert [row["step"] for row in (*metrics, *longer)] == [row["step"] for row in whole]
    for ours, theirs in zip(metrics[:2], whole[:2], strict=True):  # the schedule of the first part is shorter
        for key in ("loss", "val_loss", "grad_norm"):
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-5)


def test_the_shipped_recipe_trains_any_model(whole):
    overrides = ["train.init_from=base", "data.dataset=tiny", "train.seq_len=32", "train.tokens=5120"]
    small = ["train.batch_tokens=256", "train.device=cpu", "train.dtype=float32"]
    quiet = ["eval.every=0", "eval.tokens=1024", "eval.prompts=[]"]
    recipe = load_recipe("finetune", [*overrides, *small, *quiet], find_start=find_start)
    watch = Recorder()
    assert make_trainer(recipe, "shipped", watch).train().step == 20
    assert watch.metrics[0]["val_loss"] == pytest.approx(whole[0]["val_loss"], rel=1e-5)  # in other batches
    assert watch.metrics[-1]["val_loss"] < watch.metrics[0]["val_loss"]


def test_texts_may_be_longer_than_the_models(whole):
    metrics = train("longer", "model.max_seq_len=64", "train.tokens=512")[1].metrics
    assert metrics[1]["loss"] < 4
    assert load_pretrained("longer").model.config.max_seq_len == 64


def test_it_starts_from_the_average_of_the_weights_where_there_is_one():
    _, averaged = train("averaged", "train.ema=10%", "train.tokens=1024")
    metrics = train("from-average", "train.init_from=averaged", "train.ema=10%", "train.tokens=512")[1].metrics
    assert averaged.metrics[-1]["val_loss"] != averaged.metrics[-1]["val_loss_raw"]
    assert metrics[0]["val_loss"] == averaged.metrics[-1]["val_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_of_transformers_trains_and_opens_there_again(family, optimizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    data = DataFolder.open("data/tiny")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 48}
    names = {"gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig}
    widths = {"intermediate_size": 48} if family == "llama" else {}
    config = names[family](**sizes, **widths, vocab_size=data.tokenizer.vocab_size + 5, eos_token_id=0, bos_token_id=0)
    torch.manual_seed(0)
    theirs = write(transformers.AutoModelForCausalLM.from_config(config), data.tokenizer, tmp_path / "hf")
    name = f"{family}-{optimizer}"
    chosen = (f"optimizer={{name: {optimizer}, lr: 3e-3}}", f"train.init_from={theirs}", "train.seq_len=32")
    metrics = train(name, *chosen, "train.tokens=12800")[1].metrics
    assert len(metrics) == 51
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"] - 0.3
    loaded = load_pretrained(name)
    export_huggingface(loaded, tmp_path / "out", dtype=torch.float32)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(opened).__name__ == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family]
    assert difference(loaded.model, opened) < 1e-4


def test_what_comes_before_a_text_stays_the_models(tmp_path):
    """So that `lightlm eval` scores both alike."""
    loaded = load_pretrained("base")
    loaded.tokenizer.bos_id, loaded.tokenizer.adds_bos = 65, True
    loaded.tokenizer.__dict__["prefix_ids"] = [65]
    checkpoint.save_model(tmp_path / "model", loaded.model, loaded.tokenizer)
    edit(tmp_path / "model" / "config.json", bos_token_id=65, adds_bos=True)
    mark(tmp_path / "model")
    _, watch = train("begun", f"train.init_from={tmp_path / 'model'}", "train.tokens=512")
    saved = load_pretrained("begun").tokenizer
    assert (saved.bos_id, saved.adds_bos) == (65, True)
    resume("begun", "train.tokens=768")
    assert load_pretrained("begun").tokenizer.bos_id == 65
    assert any("expects" in note for note in watch.notes)


def mark(folder):
    """Renew the checksums of a checkpoint whose files a test has changed."""
    from lightlm import files

    listed = [file for file in sorted(folder.iterdir()) if file.name != checkpoint.MARKER]
    entries = {file.name: {"bytes": file.stat().st_size, "xxh3": files.checksum(file)} for file in listed}
    (folder / checkpoint.MARKER).write_text(json.dumps({"files": entries}))


def test_another_tokenizer_is_refused_with_the_command():
    prepare(str(write_jsonl(Path("other.jsonl"), 100)), "train:310", "data/other", val_fraction=0.1)
    with pytest.raises(DataError) as error:
        train("mixed-up", "data.dataset=other")
    message = str(error.value)
    assert "the tokenizer of data/other is not that of runs/base/checkpoints/step_000020" in message
    assert "lightlm prepare-data SOURCE --tokenizer runs/base/checkpoints/step_000020" in message
    assert not Path("runs/mixed-up").exists()


def test_a_larger_tokenizer_is_refused_with_the_command_too():
    """By `plan` as well, which does not read weights."""
    prepare(str(write_jsonl(Path("larger.jsonl"), 100)), "train:330", "data/larger", val_fraction=0.1)
    with pytest.raises(DataError, match=r"has 330 entries; prepare the data with the model's: --tokenizer runs/base/"):
        train("mixed-up", "data.dataset=larger")


def test_data_prepared_with_the_models_tokenizer_fit():
    prepare(str(write_jsonl(Path("again.jsonl"), 100)), "base", "data/again", val_fraction=0.1)
    assert train("fits", "data.dataset=again", "train.tokens=512")[0].step == 2


def test_data_prepared_with_the_models_tokenizer_fit_where_a_special_token_has_no_row(tmp_path):
    loaded, folder = load_pretrained("base"), tmp_path / "hf"
    export_huggingface(loaded, folder, dtype=torch.float32)
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tree["added_tokens"].append({"id": loaded.tokenizer.vocab_size, "content": "<pad>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    prepare(str(write_jsonl(Path("padded.jsonl"), 100)), str(folder), "data/padded", val_fraction=0.1)
    _, watch = train("padded", f"train.init_from={folder}", "data.dataset=padded", "train.tokens=512")
    assert any("1 more row in its embedding, for <pad>" in note for note in watch.notes)
    saved = load_pretrained("padded")
    assert saved.model.config.vocab_size == saved.tokenizer.vocab_size == loaded.tokenizer.vocab_size + 1
    assert watch.metrics[0]["val_loss"] < 4


def test_a_damaged_checkpoint_is_one_message(tmp_path):
    shutil.copytree("runs/base/checkpoints/step_000020", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(RecipeError, match=r"train\.init_from: .*model\.safetensors is damaged"):
        train("from-broken", f"train.init_from={tmp_path / 'broken'}")
    (tmp_path / "broken" / "config.json").write_bytes(b"{}")
    with pytest.raises(RecipeError, match=r"train\.init_from: "):
        further(f"train.init_from={tmp_path / 'broken'}")


def test_weights_of_another_shape_are_one_message(tmp_path):
    """A config.json that the weights do not fit."""
    transformers = pytest.importorskip("transformers")
    data = DataFolder.open("data/tiny")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=320
    )
    folder = write(roughen(transformers.LlamaForCausalLM(config)), data.tokenizer, tmp_path / "hf")
    edit(folder / "config.json", intermediate_size=64)
    with pytest.raises(RecipeError, match=r"train\.init_from: the weights of .* do not fit"):
        train("misfit", f"train.init_from={folder}", "train.seq_len=32")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "no model at nothing: there is no such folder, no run has that name"),
        ("data/tiny", "no model at data/tiny: the folder holds neither recipe.yaml nor config.json"),
        ("nobody/nothing", "no model nobody/nothing: there is no such folder here"),
    ],
)
def test_what_is_no_model_is_one_message(reference, message):
    with pytest.raises(RecipeError) as error:
        further(f"train.init_from={reference}")
    assert str(error.value).startswith(f"train.init_from: {message}")


def test_a_missing_model_matters_only_before_the_first_checkpoint(whole):
    shutil.copytree("runs/whole", "runs/orphan", ignore=shutil.ignore_patterns("step_*", "latest"))
    shutil.move("runs/base", "away")
    try:
        with pytest.raises(RecipeError, match=r"train\.init_from: no model at runs/base"):
            resume("orphan")
    finally:
        shutil.move("away", "runs/base")


def test_a_measurement_without_data_needs_no_weights():
    """`plan` times steps on random tokens, whose cost does not depend on the weights."""
    from lightlm.train.setup import set_up

    setup = set_up(further(), None, lambda _: None)
    assert isinstance(setup.model, Transformer)
    assert setup.tokenizer is None
