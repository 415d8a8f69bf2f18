"""`import lightlm`: the Python API beside the commands and an independent formula."""

import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import lightlm
from lightlm import api, checkpoint
from lightlm.cli.generate.command import generate
from lightlm.errors import CheckpointError, UsageError
from lightlm.generate.sampling import GREEDY
from lightlm.runs import locked
from tests.cli.generate.conftest import talker
from tests.corpus import TINY_RECIPE, write_jsonl
from tests.evaluate.tiny_run import tiny_model, tiny_tokenizer

DOCS = Path(__file__).parents[1] / "docs" / "reference"

TEXTS = ["The cat sat on the mat.", "", "A dog ran after the cat; the cat ran faster. " * 6, "naïve Ω"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    path = tmp_path_factory.mktemp("api") / "model"
    checkpoint.save_model(path, tiny_model(tokenizer), tokenizer)
    return path


@pytest.fixture
def model(folder):
    return lightlm.load(folder, device="cpu")


def test_import_loads_no_torch():
    code = "import sys, lightlm; lightlm.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there_whatever_was_imported_before():
    import lightlm.evaluate.runner
    import lightlm.train.trainer

    for name in lightlm.__all__:
        assert callable(getattr(lightlm, name)), name
    assert set(lightlm.__all__) <= set(dir(lightlm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lightlm.nothing  # noqa: B018


def test_logits_are_the_models(model):
    ids = model.tokenizer.encode(TEXTS[0])
    with torch.no_grad():  # with gradients, a CPU takes other operations (model/fused.py)
        expected = model.transformer(torch.tensor([ids]))[0].float()
    assert torch.equal(model.logits(TEXTS[0]), expected)
    assert torch.equal(model.logits(ids), expected)
    assert model.logits(ids).shape == (len(ids), model.config.vocab_size)


@pytest.mark.parametrize("ids", [[], [1] * 41])
def test_logits_refuse_what_the_context_cannot_hold(model, ids):
    with pytest.raises(UsageError, match=r"1 to 40 tokens, got (0|41)"):
        model.logits(ids)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_logits_refuse_ids_outside_the_vocabulary(model, wrong):
    with pytest.raises(UsageError, match=f"ids from 0 to .*{wrong}"):
        model.logits([1, wrong])


def test_an_evaluation_of_no_documents_is_refused(model):
    with pytest.raises(UsageError, match="limit must be at least 1, is 0"):
        lightlm.evaluate(model, limit=0)


@torch.no_grad()
def test_scores_are_the_sum_of_the_tokens_log_probabilities(model):
    """In float64: windows of the context's length, of which the last sees the tokens before it."""
    length, start = model.config.max_seq_len, model.tokenizer.end_of_text_id
    for text, got in zip(TEXTS, model.score(TEXTS), strict=True):
        ids, total = [start, *model.tokenizer.encode(text)], 0.0
        for first in range(0, len(ids) - 1, length):
            end = min(first + length, len(ids) - 1)
            window = torch.tensor([ids[max(end - length, 0) : end + 1]])
            log_probs = model.transformer(window[:, :-1]).double().log_softmax(-1)
            total += float(log_probs[0].gather(1, window[0, 1:, None])[first - end :].sum())
        assert got.log_likelihood == pytest.approx(total, rel=1e-5)
        assert (got.tokens, got.text_bytes) == (len(ids) - 1, len(text.encode()))
        if text:
            assert got.bits_per_byte == pytest.approx(-total / math.log(2) / len(text.encode()), rel=1e-5)
            assert got.nats_per_token == pytest.approx(-total / (len(ids) - 1), rel=1e-5)
        else:
            assert math.isnan(got.bits_per_byte)


def test_scores_are_those_of_lm_evals_tasks(model):
    from lm_eval.api.instance import Instance

    from lightlm.evaluate.harness import LightLM

    harness = LightLM(model._loaded, show_progress=False)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    expected = harness.loglikelihood_rolling(requests)
    assert [score.log_likelihood for score in model.score(TEXTS)] == pytest.approx(expected, rel=1e-6)


def test_score_of_a_bare_string_is_refused(model):
    with pytest.raises(UsageError, match=r"score\(\[text\]\)"):
        model.score("one text")


def test_generate_repeats_itself_and_takes_the_most_likely_token(model):
    settings = {"max_new_tokens": 12, "seed": 3}
    assert model.generate("The cat", **settings) == model.generate("The cat", **settings)
    assert model.samples("The cat", 2, 12, seed=3)[0] == model.generate("The cat", **settings)
    ids = model.tokenizer.encode("The cat")
    for _ in range(5):
        ids.append(int(model.logits(ids)[-1].argmax()))
    greedy = model.generate("The cat", max_new_tokens=5, temperature=0)
    assert model.tokenizer.decode(ids[-5:]).startswith(greedy)


def test_a_stop_string_ends_a_continuation(model):
    whole = model.generate("The cat", max_new_tokens=12, temperature=0)
    assert model.generate("The cat", max_new_tokens=12, temperature=0, stop=whole[3]) == whole[: whole.index(whole[3])]
    with pytest.raises(UsageError, match="empty"):
        model.generate("The", stop=["a", ""])


def test_chat_answers_as_the_command_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save_model(tmp_path / "talker", talker().model, talker().tokenizer)
    messages = [{"role": "user", "content": "the cat"}]
    answer = lightlm.load("talker", device="cpu").chat(messages, max_new_tokens=8, sampling=GREEDY)
    command = typer.Typer()
    command.command()(generate)
    arguments = ["the cat", "--chat", "--checkpoint", "talker", "--max-new-tokens", "8", "--temperature", "0"]
    assert CliRunner().invoke(command, arguments).stdout == f"{answer}\n"


def test_a_model_without_a_chat_template_says_so(model):
    with pytest.raises(UsageError, match="no chat template"):
        model.chat([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_generate_refuses_settings_out_of_range(model, settings):
    with pytest.raises(UsageError):
        model.generate("The", **settings)


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no model at"):
        lightlm.load(tmp_path / "nothing")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with data, a recipe, and a run, all made through the API."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        source = write_jsonl(folder / "tiny.jsonl")
        data = lightlm.prepare(source, tokenizer="train:320", val_fraction=0.1)
        (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
        result = lightlm.train("tiny.yaml", "train.tokens=2560", name="first")
    return folder, source, data, result


def test_prepare_makes_the_folder_that_the_command_makes(workspace, monkeypatch, tmp_path):
    folder, source, data, _ = workspace
    assert data.path == Path("data/tiny")
    command = [
        "prepare-data",
        str(source),
        "--tokenizer",
        "train:320",
        "--val-fraction",
        "0.1",
        "--out",
        str(tmp_path / "a"),
    ]
    subprocess.run([sys.executable, "-m", "lightlm", *command], check=True, capture_output=True)
    for made in sorted((tmp_path / "a").glob("*.bin")):
        assert made.read_bytes() == (folder / "data" / "tiny" / made.name).read_bytes()
    monkeypatch.chdir(folder)
    assert lightlm.prepare(source, tokenizer="train:320", val_fraction=0.1).manifest.already_prepared is False
    assert (
        len(lightlm.prepare(source, out=tmp_path / "b", tokenizer="train:320", max_tokens="1K").split("train")) < 2000
    )


def test_train_leaves_a_run_and_resumes_it(workspace, monkeypatch):
    folder, _, _, result = workspace
    monkeypatch.chdir(folder)
    assert (result.run, result.tokens, result.interrupted) == (Path("runs/first"), 2560, False)
    for name in ("recipe.yaml", "metrics.jsonl", "machine.json", "report.html"):
        assert (result.run / name).is_file()
    steps, notes = [], []

    class Watch(lightlm.Observer):
        def step(self, metrics):
            steps.append(metrics["step"])

        def note(self, text):
            notes.append(text)

    def broken(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr("lightlm.api.renew_report", broken)
    more = lightlm.train(None, "train.tokens=3840", resume="first", observer=Watch())
    assert (more.run, more.tokens, steps) == (Path("runs/first"), 3840, list(range(11, 16)))
    assert "no plots were made (no font)" in notes


def test_train_refuses_a_run_that_is_trained_and_a_name_that_is_taken(workspace, monkeypatch):
    folder, *_ = workspace
    monkeypatch.chdir(folder)
    before = (folder / "runs/first/metrics.jsonl").read_bytes()
    with locked(Path("runs/first")):
        for again in ({"resume": "first"}, {"recipe": "tiny.yaml", "name": "first", "overwrite": True}):
            with pytest.raises(CheckpointError, match="runs/first is being trained by process"):
                lightlm.train(**again)
    with pytest.raises(CheckpointError, match="runs/first exists already"):
        lightlm.train("tiny.yaml", name="first")
    with pytest.raises(UsageError, match="choose one of them"):
        lightlm.train(resume="first", overwrite=True)
    assert (folder / "runs/first/metrics.jsonl").read_bytes() == before
    lightlm.train("tiny.yaml", "train.tokens=256", name="replaced")
    lightlm.train("tiny.yaml", "train.tokens=512", name="replaced", overwrite=True)
    assert (folder / "runs/replaced/metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("arguments", [{}, {"recipe": "tiny.yaml", "resume": "first"}])
def test_train_takes_a_recipe_or_a_run(arguments):
    with pytest.raises(UsageError, match="takes a recipe, or resume=RUN"):
        lightlm.train(**arguments)


def test_evaluate_gives_what_the_command_prints(workspace, monkeypatch):
    folder, *_ = workspace
    monkeypatch.chdir(folder)
    got = lightlm.evaluate("first", "heldout", device="cpu")
    command = [sys.executable, "-m", "lightlm", "eval", "first", "--tasks", "heldout", "--device", "cpu", "--json"]
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    [expected] = printed["models"]
    assert got["results"] == expected["results"]
    assert Path(got["file"]).is_file()
    again = lightlm.evaluate(lightlm.load("first", device="cpu"), ["heldout"], limit=2)
    assert again["results"][0]["documents"] == 2


def test_a_loaded_models_scores_have_a_file_for_its_precision(workspace, monkeypatch):
    folder, *_ = workspace
    monkeypatch.chdir(folder)
    for dtype in ("auto", "float16"):
        scores = lightlm.evaluate(lightlm.load("first", device="cpu", dtype=dtype), "heldout", limit=2)
        assert Path(scores["file"]).stem.endswith(f"heldout{'' if dtype == 'auto' else '_float16'}_limit2")


def test_the_notebook_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # a statement per cell; a last expression shows nothing here
    printed = capsys.readouterr().out
    assert re.search(r"^4 \d", printed, flags=re.MULTILINE)
    assert "heldout bits_per_byte" in printed


def test_the_page_documents_every_public_name():
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    for name in lightlm.__all__:
        assert name in page, name
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        compile(code, "python.md", "exec")


def test_the_page_documents_every_argument():
    """In the heading of a function, and in the row of a member of `Model`."""
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    heads = re.findall(r"^(?:## lightlm\.|\| `)(\w+)\((.*?)\)(?:`|$)", page, flags=re.MULTILINE)
    described = {name: re.findall(r"\w+", re.sub(r"=[^,]*", "", arguments)) for name, arguments in heads}
    documented = ("load", "prepare", "train", "evaluate")
    for function in (*(getattr(api, name) for name in documented), api.Model.generate, api.Model.score):
        arguments = [name for name in inspect.signature(function).parameters if name != "self"]
        assert described[function.__name__] == arguments
