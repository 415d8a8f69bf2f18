import errno
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
import yaml
from filelock import FileLock
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from lightlm import files
from lightlm.checkpoint import load_model, save_model, write_checkpoint
from lightlm.cli.convert import convert
from lightlm.convert import folding
from lightlm.convert.formats import FORMATS
from lightlm.convert.load import load_pretrained
from lightlm.convert.protocol import Format
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import CheckpointError, ConvertError, UsageError
from lightlm.model.transformer import Transformer
from lightlm.quantities import format_quantity
from lightlm.recipe import load_run_recipe
from tests.convert.models import roughen
from tests.corpus import TINY_RECIPE, make_data
from tests.shapes import SHAPES

STEP = "runs/demo/checkpoints/step_000020"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The cat sat on the mat; the dog did not."] * 3, 300)


@pytest.fixture
def run(tokenizer, tmp_path, monkeypatch):
    """A folder with one run of two checkpoints."""
    monkeypatch.chdir(tmp_path)
    model = Transformer(replace(SHAPES["llama"], vocab_size=tokenizer.vocab_size, layer_sharing=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for step in (10, 20):
        write_checkpoint(Path("runs/demo"), step, model.state_dict(), model.config, tokenizer)
    Path("runs/demo/recipe.yaml").touch()
    files.point_to(Path("runs/latest"), "demo")
    return model.eval()


def call(*arguments):
    """Run the command; a LightLMError is raised here, where `lightlm` would print it."""
    app = typer.Typer()
    app.command()(convert)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def invoke(*arguments):
    return call(*arguments).stdout


def messages_of(*arguments):
    return call(*arguments).stderr


def test_five_line_chain_works_twice(run):
    """Without arguments, the newest run is exported to runs/RUN/hf, also over an earlier export."""
    output = invoke()
    config = Path("runs/demo/hf/config.json")
    written = config.stat().st_mtime_ns
    assert 'AutoModelForCausalLM.from_pretrained("runs/demo/hf")' in output
    assert "LlamaForCausalLM" in output
    assert "float32" in output
    invoke("--dtype", "bfloat16")
    assert config.stat().st_mtime_ns > written
    assert json.loads(config.read_text())["dtype"] == "bfloat16"
    assert not list(Path("runs/demo").glob(".hf*"))


def test_default_export_that_was_changed_is_kept(run):
    invoke()
    Path("runs/demo/hf/README.md").write_text("my own model card")
    with pytest.raises(UsageError, match="--overwrite"):
        invoke()
    assert Path("runs/demo/hf/README.md").read_text() == "my own model card"
    invoke("--overwrite")
    assert "my own" not in Path("runs/demo/hf/README.md").read_text()


def test_the_model_card_names_path_data_and_scores(run):
    """huggingface_hub reads the card as the Hub does."""
    recipe = TINY_RECIPE.replace("max_seq_len: 32", "max_seq_len: 32, vocab_size: 320")
    Path("runs/demo/recipe.yaml").write_text(recipe)
    Path("runs/demo/eval").mkdir()
    scores = {
        "results": {"quiz": {"alias": "quiz", "acc,none": 0.5, "acc_stderr,none": 0.1}},
        "config": {"limit": None},
    }
    Path("runs/demo/eval/step_000020_quiz.json").write_text(json.dumps(scores))
    Path("runs/demo/eval/step_000020_trial_limit3.json").write_text(json.dumps(scores | {"config": {"limit": 3}}))
    Path("runs/demo/eval/step_000010_quiz.json").write_text(json.dumps(scores))
    invoke()
    card = ModelCard.load("runs/demo/hf/README.md")
    assert 'AutoModelForCausalLM.from_pretrained("runs/demo/hf")' in card.text
    assert f"Exported from `{STEP}`" in card.text
    assert "Training data: `data/" in card.text
    assert card.data.license == "unknown"
    assert "License" in card.text
    assert "| Layers | 4 of width 32 |" in card.text
    assert 'lightlm generate "Once upon a time" --checkpoint runs/demo/hf' in card.text
    assert yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])["name"] == "tiny"
    make_data(Path.cwd())
    invoke("--overwrite")
    described = ModelCard.load("runs/demo/hf/README.md").text
    assert "Training data: `tiny.jsonl` (1 file), " in described
    assert str(Path.cwd()) not in described
    manifest = Path("data/tiny/manifest.json")
    source = {"source": "hf:HuggingFaceFW/fineweb-edu:sample-10BT"}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | source))
    invoke("--overwrite")
    assert ModelCard.load("runs/demo/hf/README.md").data.datasets == ["HuggingFaceFW/fineweb-edu"]
    [result] = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("quiz", "acc", 0.5)


def test_the_card_of_an_earlier_checkpoint_says_how_far_it_was_trained(run):
    Path("runs/demo/recipe.yaml").write_text(TINY_RECIPE.replace("max_seq_len: 32", "max_seq_len: 32, vocab_size: 320"))
    total = load_run_recipe(Path("runs/demo")).train.tokens
    rows = [{"step": 10, "tokens": total // 2}, {"step": 20, "tokens": total}]
    Path("runs/demo/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, half = format_quantity(total), format_quantity(total // 2)
    for arguments, words in (([], f"{whole} training tokens in all"), ([STEP[:-2] + "10"], f"after {half} of {whole}")):
        folder = json.loads(invoke(*arguments, "--json"))["folder"]
        assert words in Path(folder, "README.md").read_text()


def test_the_card_has_the_losses_of_its_step_and_the_license(run):
    rows = [
        {"step": 10, "val_loss": 9.0},
        {"step": 20, "val_loss": 3.14159, "val_bpb": 1.5},
        {"step": 30, "val_loss": 8.0},
    ]
    Path("runs/demo/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    invoke("--license", "MIT")
    card = ModelCard.load("runs/demo/hf/README.md")
    assert "| validation split | loss (nats per token) | 3.1416 |" in card.text
    assert "| validation split | bits per byte | 1.5 |" in card.text
    assert "9.0" not in card.text
    assert card.data.license == "mit"
    assert "`mit` for the weights" in card.text
    Path("runs/demo/metrics.jsonl").write_text("damaged")
    warning = "hf/README.md said license: mit, and the new one says unknown; to keep it, give --license mit"
    assert [warning in messages_of(), warning in messages_of()] == [True, False]
    assert "None measured" in ModelCard.load("runs/demo/hf/README.md").text
    Path("runs/demo/hf/README.md").write_text("---\ntags: 5\n---\nMine")
    messages_of("--overwrite")
    assert "None measured" in ModelCard.load("runs/demo/hf/README.md").text


def test_an_upload(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    uploads = []
    monkeypatch.setattr(
        "lightlm.convert.huggingface.hub.upload",
        lambda folder, name, *, private: uploads.append((folder, name, private)) or f"https://hub/{name}",
    )
    output = invoke("--push", "me/demo", "--private", "--license", "apache-2.0")
    assert uploads == [(Path("runs/demo/hf"), "me/demo", True)]
    assert "Uploaded to https://hub/me/demo" in output
    assert 'AutoModelForCausalLM.from_pretrained("me/demo")' in Path("runs/demo/hf/README.md").read_text()
    assert json.loads(invoke("--push", "me/demo", "--json"))["address"] == "https://hub/me/demo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "lightlm", "--push", "me/demo", "--out", "x"], "are for a Hugging Face folder, not for lightlm"),
        (["--to", "gguf", "--license", "mit"], "are for a Hugging Face folder, not for gguf"),
        (["--private"], "name the repository with --push"),
        (["--push", "demo"], "write ORGANIZATION/NAME"),
        (["--license", "my own"], "write the Hub's identifier"),
    ],
)
def test_uploads_that_cannot_work_are_refused_first(run, arguments, message):
    with pytest.raises(UsageError, match=message):
        invoke(*arguments)
    assert not Path("runs/demo/hf").exists()


def test_a_card_without_scores_or_recipe_says_so(run):
    invoke()
    card = ModelCard.load("runs/demo/hf/README.md")
    assert "None measured" in card.text
    assert "unknown to LightLM" in card.text


def test_there_and_back(run):
    invoke("--out", "exported", "--json")
    summary = json.loads(invoke("exported", "--json"))
    assert (summary["folder"], summary["format"]) == ("exported-lightlm", "lightlm")
    assert "exported-lightlm" in summary["python"]
    tokens = torch.arange(9)[None]
    assert torch.equal(load_model(Path("exported-lightlm")).model(tokens), run(tokens))


def test_json_is_the_whole_output(run):
    summary = json.loads(invoke("--json"))
    assert summary["class"] == "LlamaForCausalLM"
    # Two blocks that run twice each are four layers in the file, and count as four.
    block = sum(parameter.numel() for parameter in run.blocks.parameters())
    assert summary["parameters"] == run.num_parameters()["total"] + block
    assert summary["files"]["model.safetensors"] == Path("runs/demo/hf/model.safetensors").stat().st_size
    assert summary["bytes"] == sum(summary["files"].values())
    assert Path(summary["source"]) == Path(STEP)


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("demo", "runs/demo/hf"),
        ("runs/demo", "runs/demo/hf"),
        (STEP, "runs/demo/hf-step_000020"),
        ("alone", "alone-hf"),
    ],
)
def test_default_folder(model, folder, run, tokenizer):
    save_model(Path("alone"), run, tokenizer)
    assert json.loads(invoke(model, "--json"))["folder"] == str(Path(folder))
    assert (Path(folder) / "model.safetensors").is_file()


def test_default_folder_of_a_hub_model(run, tmp_path, monkeypatch):
    import huggingface_hub

    invoke("--out", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "cache"))
    assert json.loads(invoke("someone/Model", "--json"))["folder"] == "Model-lightlm"


@pytest.mark.parametrize("format_", ["coreml", ""])
def test_formats_to_come(format_, run):
    with pytest.raises(UsageError, match="hf and gguf and onnx and pt2 and lightlm"):
        invoke("--to", format_)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "float32, bfloat16, float16"),
        (["--to", "lightlm"], "in that format already"),
        (["--out", STEP, "--overwrite"], "is or holds the model to convert"),
        (["--out", ".", "--overwrite"], "is or holds the model to convert"),
        (["--from", "hf"], "is not in that format"),
        (["--from", "onnx"], "unknown format; this version converts from hf and gguf and lightlm"),
        (["--quantize", "q8_0"], r"--quantize q8_0: hf does not have it; known: q8_0, q5_1, .* \(gguf\)"),
        (["--quantize", "q3", "--to", "gguf"], "--quantize q3: gguf does not have it"),
        (["--quantize", "q8_0", "--to", "gguf", "--dtype", "float16"], "takes the place of --dtype float16"),
        (["--to", "gguf", "--out", "notes", "--overwrite"], r"gguf is a file \*\.gguf; write --out notes/notes\.gguf"),
        (
            ["--to", "gguf", "--out", "demo.Modelfile"],
            r"write --out demo\.gguf",
        ),  # which its own Modelfile would replace
        (["--to", "gguf", "--out", "demo"], r"write --out demo\.gguf"),
        (["--out", "notes", "--overwrite"], "is not a model"),
        (["--out", "notes/todo", "--overwrite"], "hf is a folder, and this is a file"),
    ],
)
def test_wrong_usage_writes_and_loses_nothing(arguments, message, run):
    Path("notes").mkdir()
    Path("notes/todo").write_text("milk")
    before = sorted(Path(".").rglob("*"))
    with pytest.raises(UsageError, match=message):
        invoke(*arguments)
    assert sorted(Path(".").rglob("*")) == before


def test_given_folder_is_replaced_only_with_overwrite(run):
    invoke("--out", "exported")
    with pytest.raises(UsageError, match="exists already"):
        invoke("--out", "exported")
    invoke("--out", "exported", "--overwrite")
    Path("empty").mkdir()
    Path("empty/.DS_Store").touch()  # of a file manager
    invoke("--out", "empty")


def test_what_only_looks_like_a_model_is_never_replaced(run):
    Path("app/src").mkdir(parents=True)
    Path("app/config.json").write_text('{"port": 80}')
    Path("app/src/main.js").write_text("hi")
    Path("step_notes").mkdir()
    Path("step_notes/todo").write_text("milk")
    invoke("--out", "clone")
    Path("clone/.git").mkdir()
    before = sorted(Path(".").rglob("*"))
    for out, why in (("app", "is not a model"), ("step_notes", "is not a model"), ("clone", "is a git repository")):
        with pytest.raises(UsageError, match=f"{out} .*{why}"):
            invoke("--out", out, "--overwrite")
    assert sorted(Path(".").rglob("*")) == before


def test_an_earlier_checkpoint_is_replaced_while_nobody_changed_it(run):
    for _ in range(2):
        folder = Path(json.loads(invoke("--to", "lightlm", "--average", "2", "--json"))["folder"])
    (folder / "notes").write_text("keep me")
    with pytest.raises(UsageError, match="exists already"):
        invoke("--to", "lightlm", "--average", "2")
    (folder / "notes").unlink()
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UsageError, match="exists already"):
        invoke("--to", "lightlm", "--average", "2")
    assert not FORMATS["lightlm"].is_own(Path(STEP))


def test_a_modelfile_that_was_changed_is_kept(run):
    pytest.importorskip("gguf")
    mine = Path("runs/demo/demo.Modelfile")
    mine.write_text("FROM ./other.gguf\nSYSTEM Be brief.\n")
    with pytest.raises(UsageError, match=r"demo\.Modelfile would be replaced"):
        invoke("--to", "gguf")
    assert not Path("runs/demo/demo.gguf").exists()
    invoke("--to", "gguf", "--overwrite")
    invoke("--to", "gguf")
    written = mine.read_text()
    mine.write_text(written.replace("PARAMETER", "SYSTEM Be brief.\nPARAMETER", 1))
    for arguments in ([], ["--out", "runs/demo/demo.gguf"]):
        with pytest.raises(UsageError, match=r"demo\.Modelfile would be replaced"):
            invoke("--to", "gguf", *arguments)
    mine.write_text(written)
    invoke("--to", "gguf")


def test_an_upload_that_failed_is_repeated_by_the_same_command(run, monkeypatch):
    monkeypatch.setattr("lightlm.convert.huggingface.hub.check_upload", lambda repository: None)
    monkeypatch.setattr("lightlm.convert.huggingface.hub.upload", fail := _Failing())
    with pytest.raises(ConvertError, match="cannot be reached"):
        invoke("--out", "pushed", "--push", "me/demo")
    fail.fails = False
    assert "Uploaded to https://hub" in invoke("--out", "pushed", "--push", "me/demo")
    Path("pushed/README.md").write_text("my card")
    with pytest.raises(UsageError, match="exists already"):
        invoke("--out", "pushed", "--push", "me/demo")


class _Failing:
    fails = True

    def __call__(self, folder, repository, *, private):
        if self.fails:
            raise ConvertError("the Hub cannot be reached")
        return "https://hub"


def test_the_working_directory_is_refused_before_anything_is_converted(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lightlm.cli.convert.convert_model", lambda *_, **__: pytest.fail("it was converted"))
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    for out in (".", str(tmp_path / "empty")):
        with pytest.raises(UsageError, match="empty is or holds the working directory"):
            invoke(str(tmp_path / STEP), "--out", out)


def test_model_without_a_class(run, tokenizer):
    banded = Transformer(replace(SHAPES["gpt3"], vocab_size=tokenizer.vocab_size))
    save_model(Path("banded"), banded, tokenizer)
    with pytest.raises(ConvertError, match="sliding_window: 5"):
        invoke("banded")
    assert not Path("banded-hf").exists()


def test_no_run_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no run yet"):
        invoke()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify(dtype, run):
    pytest.importorskip("transformers")
    assert json.loads(invoke("--verify", "--dtype", dtype, "--json"))["max_logit_difference"] < 1e-4
    assert "logits differ by" in invoke("--verify", "--dtype", dtype)
    back = json.loads(invoke("runs/demo/hf", "--verify", "--dtype", dtype, "--json"))
    assert back["max_logit_difference"] < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_counts_norms_as_their_class_stores_them(dtype, run, tokenizer):
    """Qwen3.5 stores the weight of a norm minus 1, and rounds that."""
    pytest.importorskip("transformers")
    gated = Transformer(replace(SHAPES["gated"], vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        for parameter in gated.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(Path("gated"), gated, tokenizer)
    for arguments in (["gated"], ["gated-hf"]):
        assert json.loads(invoke(*arguments, "--verify", "--dtype", dtype, "--json"))["max_logit_difference"] < 1e-5


def test_verify_finds_a_wrong_export(run, monkeypatch):
    pytest.importorskip("transformers")
    from lightlm.convert.huggingface import folder as huggingface

    right = huggingface.write_config
    invoke()
    before = {path.name: path.read_bytes() for path in Path("runs/demo/hf").iterdir()}
    monkeypatch.setattr(huggingface, "write_config", lambda *args: {**right(*args), "rms_norm_eps": 0.1})
    with pytest.raises(ConvertError, match=r"does not compute what.* is again what it was before"):
        invoke("--verify", "--overwrite")
    assert {path.name: path.read_bytes() for path in Path("runs/demo/hf").iterdir()} == before, "it was right"
    assert not list(Path("runs/demo").glob(".hf*"))


def test_a_signal_while_verifying_puts_the_earlier_export_back(run, monkeypatch):
    pytest.importorskip("transformers")
    invoke()
    before = {path.name: path.read_bytes() for path in Path("runs/demo/hf").iterdir()}
    monkeypatch.setattr(type(FORMATS["hf"]), "verify", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        app = typer.Typer()
        app.command()(convert)
        assert CliRunner().invoke(app, ["--verify", "--dtype", "float16"]).exit_code == 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert {path.name: path.read_bytes() for path in Path("runs/demo/hf").iterdir()} == before
    assert not list(Path("runs/demo").glob(".hf*"))


def test_a_second_conversion_to_the_same_path_is_refused(run):
    with (
        FileLock("runs/demo/.hf.lock"),
        pytest.raises(ConvertError, match="another `lightlm convert` is writing runs/demo/hf"),
    ):
        invoke()
    assert not Path("runs/demo/hf").exists()
    invoke()
    assert not list(Path("runs/demo").glob(".hf*"))


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_written_to(run, monkeypatch, error):
    def unsupported(*args, **kwargs):
        raise error

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    invoke()
    assert Path("runs/demo/hf/model.safetensors").is_file()


def test_fold_writes_a_plain_checkpoint(run, tokenizer):
    """It computes the same, stands beside the run's other conversions, and has nothing left to fold."""
    config = replace(SHAPES["scaled_moe"], vocab_size=tokenizer.vocab_size)
    trained = roughen(Transformer(config))
    write_checkpoint(Path("runs/demo"), 30, trained.state_dict(), trained.config, tokenizer)
    summary = json.loads(invoke("--fold", "--verify", "--json"))
    assert summary["folder"] == str(Path("runs/demo/folded"))
    assert summary["max_logit_difference"] < 1e-6
    plain = load_pretrained("runs/demo/folded").model
    assert plain.config == trained.config.folded() != trained.config
    tokens = torch.randint(config.vocab_size, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens), trained(tokens), atol=1e-5, rtol=0)
    with pytest.raises(ConvertError, match=r"nothing to fold: it has none of model.multipliers, model.residual_scale"):
        invoke("runs/demo/folded", "--fold", "--out", "again")
    with pytest.raises(UsageError, match="--fold: a conversion to hf always folds"):
        invoke("--fold", "--to", "hf")
    invoke("--fold")
    Path("runs/demo/folded/notes").write_text("keep me")
    with pytest.raises(UsageError, match="folded exists already"):
        invoke("--fold")
    assert load_pretrained(invoke_named("runs/demo/checkpoints/step_000030", "--fold")).model.config == plain.config


def invoke_named(model, *options):
    return json.loads(invoke(model, *options, "--json"))["folder"]


def test_verify_finds_a_wrong_fold(run, tokenizer, monkeypatch):
    model = roughen(Transformer(replace(SHAPES["scaled"], vocab_size=tokenizer.vocab_size)))
    save_model(Path("scaled"), model, tokenizer)
    monkeypatch.setattr(folding, "_WRITERS", dict.fromkeys(folding._WRITERS, ()))
    with pytest.raises(ConvertError, match="scaled: folding its scales into its weights changes logits by up to"):
        invoke("scaled", "--fold", "--verify")


class Archive(Format):
    """A format as a newcomer would add it: a checkpoint folder packed into one file."""

    name, suffix, takes, makes = "archive", ".zip", "a packed folder", "a .zip file"

    def detect(self, path):
        return path.suffix == ".zip" and path.is_file()

    def target(self, config):
        return "Archive"

    def refusal(self, config):
        return "qk_norm: true" if config.qk_norm else ""

    def read(self, path):
        shutil.unpack_archive(path, path.with_suffix(".unpacked"))
        return replace(load_model(path.with_suffix(".unpacked")), path=path)

    def write(self, loaded, out, dtype, quantize=""):
        save_model(Path("packing"), loaded.model.to(dtype), loaded.tokenizer)
        shutil.move(shutil.make_archive("packed", "zip", "packing"), out)
        return {"parameters": 1, "python": f"unzip {out}"}


def test_a_new_format_is_one_class_and_one_registration(run, tokenizer, monkeypatch):
    """Both directions of the command, `--list` and MODEL itself work with it."""
    monkeypatch.setitem(FORMATS, "archive", Archive())
    summary = json.loads(invoke("--to", "archive", "--verify", "--json"))
    assert (summary["folder"], summary["class"]) == (str(Path("runs/demo/demo.zip")), "Archive")
    assert list(summary["files"]) == ["demo.zip"]
    back = json.loads(invoke("runs/demo/demo.zip", "--from", "archive", "--verify", "--json"))
    assert (back["format"], back["folder"]) == ("lightlm", str(Path("runs/demo/demo-lightlm")))
    tokens = torch.arange(9)[None]
    for path in (Path(back["folder"]), Path("runs/demo/demo.zip")):
        assert torch.equal(load_pretrained(path).model(tokens), run(tokens))
    row = json.loads(invoke("--list", "--json"))[-1]
    assert (row["format"], row["reads"], row["writes"], row["makes"]) == ("archive", True, True, "a .zip file")
    save_model(Path("normed"), Transformer(replace(SHAPES["qwen3"], vocab_size=tokenizer.vocab_size)), tokenizer)
    with pytest.raises(ConvertError, match="normed cannot be converted to archive: qk_norm: true"):
        invoke("normed", "--to", "archive")


def test_gguf_there_and_back(run):
    """A file and its Modelfile in the run, each replaced by a later export, and read by path like any model."""
    pytest.importorskip("gguf")
    summary = json.loads(invoke("--to", "gguf", "--json"))
    assert (summary["folder"], summary["class"]) == (str(Path("runs/demo/demo.gguf")), "llama of llama.cpp")
    assert list(summary["files"]) == ["demo.gguf", "demo.Modelfile"]
    quantized = json.loads(invoke("--to", "gguf", "--quantize", "q8_0", "--json"))
    assert quantized["folder"] == str(Path("runs/demo/demo-q8_0.gguf"))
    assert quantized["files"]["demo-q8_0.gguf"] < summary["files"]["demo.gguf"]
    assert "q8_0" in invoke("--to", "gguf", "--quantize", "q8_0")
    back = json.loads(invoke("runs/demo/demo.gguf", "--json"))
    assert (back["format"], back["folder"]) == ("lightlm", str(Path("runs/demo/demo-lightlm")))
    tokens = torch.arange(9)[None]
    for path in (Path(back["folder"]), Path("runs/demo/demo.gguf")):
        assert torch.equal(load_pretrained(path).model(tokens), run(tokens))


def test_gguf_into_a_new_folder_with_blanks_in_names(run):
    pytest.importorskip("gguf")
    summary = json.loads(invoke("--to", "gguf", "--out", "für uns/my model.gguf", "--json"))
    assert summary["python"] == "llama-cli -m 'für uns/my model.gguf'"
    text = Path("für uns/my model.Modelfile").read_text(encoding="utf-8")
    assert "-f 'my model.Modelfile'\nFROM ./my model.gguf\n" in text
    assert json.loads(invoke("für uns/my model.gguf", "--json"))["format"] == "lightlm"


def test_gguf_of_others_is_replaced_only_with_overwrite(run):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter("runs/demo/demo.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"demo\.gguf exists already"):
        invoke("--to", "gguf")
    invoke("--to", "gguf", "--overwrite")


@pytest.mark.parametrize(("package", "arguments"), [("gguf", []), ("xllamacpp", ["--verify"])])
def test_gguf_without_its_packages(package, arguments, run, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "lightlm.convert.gguf.file", raising=False)  # as an earlier test leaves it
    if package == "xllamacpp":
        pytest.importorskip("gguf")
    with pytest.raises(ConvertError, match=rf"{package}, which is not installed; run .* --editable \"\.\[gguf\]\""):
        invoke("--to", "gguf", *arguments)
    assert not Path("runs/demo/demo.gguf").exists()


def test_onnx(run, monkeypatch):
    """A folder in the run, replaced by a later export; it is written, not read."""
    pytest.importorskip("onnx", reason="onnx is not installed; it is in the extra [onnx]")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is in the extra [onnx]")
    here = Path.cwd()
    summary = json.loads(invoke("--to", "onnx", "--verify", "--json"))
    assert (summary["folder"], summary["class"]) == (str(Path("runs/demo/onnx")), "ONNX graph")
    assert summary["max_logit_difference"] < 1e-4
    assert {"onnx/model.onnx", "config.json", "tokenizer.json"} < summary["files"].keys()
    assert summary["bytes"] == sum(path.stat().st_size for path in Path("runs/demo/onnx").rglob("*.*"))
    assert "logits differ by" in invoke("--to", "onnx", "--quantize", "int8", "--verify")
    assert Path("runs/demo/onnx-int8/onnx/model_quantized.onnx").is_file()
    invoke("--to", "onnx", "--dtype", "float16")
    assert [path.name for path in Path("runs/demo/onnx/onnx").iterdir()] == ["model_fp16.onnx"]
    with pytest.raises(ConvertError, match="a model in the format onnx, which LightLM only writes"):
        invoke("runs/demo/onnx")
    for package, option in (("onnx", []), ("onnxruntime", ["--verify"])):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConvertError, match=rf"{package}, which .*\.\[onnx\]"):
            invoke("--to", "onnx", *option)
        monkeypatch.undo()
        monkeypatch.chdir(here)


def test_list_of_formats():
    """What they read, write and need."""
    rows = {row["format"]: row for row in json.loads(invoke("--list", "--json"))}
    assert rows.keys() == FORMATS.keys()
    assert "LlamaForCausalLM" in rows["hf"]["kinds"]
    assert "q8_0" in rows["gguf"]["quantizations"]
    shown = invoke("--list")
    assert "checkpoint" in shown
    assert "[hf] for --verify" in " ".join(shown.split())
    assert '--editable ".[EXTRA]"' in shown


def test_options_name_every_format():
    app = typer.Typer()
    app.command()(convert)
    shown = CliRunner().invoke(app, ["--help"]).output.replace("│", " ")
    assert "hf, gguf, onnx, pt2, lightlm" in " ".join(shown.split())


def test_verify_without_transformers(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConvertError, match=r'--editable "\.\[hf\]"'):
        invoke("--verify")
    assert not Path("runs/demo/hf").exists()


@pytest.mark.parametrize("to", ["hf", "lightlm"])
def test_weights_beyond_float16_are_refused(to, run, tokenizer):
    """A scale that training keeps apart may make weights that are infinite in float16."""
    model = Transformer(replace(SHAPES["scaled"], vocab_size=tokenizer.vocab_size, embedding_scale=1e8))
    save_model(Path("scaled"), model, tokenizer)
    fold = ["--fold"] if to == "lightlm" else []
    with pytest.raises(ConvertError, match=r"embed_tokens.weight has weights up to .*use --dtype bfloat16"):
        invoke("scaled", "--dtype", "float16", "--out", "exported", *fold)
    assert not Path("exported").exists()
    invoke("scaled", "--dtype", "bfloat16", "--out", "exported", *fold, "--verify")
