"""`lightlm eval` with several models and published figures: files, comparisons and output."""

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from lightlm.checkpoint import write_checkpoint
from lightlm.cli import console
from lightlm.cli.evaluate import evaluate
from lightlm.errors import UsageError
from lightlm.evaluate.results import documents
from lightlm.evaluate.tasks import manager
from tests.evaluate.tiny_run import tiny_model, write_world

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/demo, and runs/other with other weights; the quiz is called hellaswag, for which there are baselines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.out, "_width", 160)
    monkeypatch.setattr(manager, "_OURS", {"heldout", "quiz.yaml"})  # skips lm-eval's index: 5 s
    loaded = write_world(tmp_path)
    other = tmp_path / "runs/other"
    other.mkdir()
    shutil.copy("runs/demo/recipe.yaml", other)
    model = tiny_model(loaded.tokenizer, seed=1)
    write_checkpoint(other, 7, model.state_dict(), model.config, loaded.tokenizer)
    quiz = tmp_path / "quiz.yaml"
    quiz.write_text(quiz.read_text().replace("task: quiz", "task: hellaswag"))
    return tmp_path


def run(*arguments: str) -> Result:
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 0, done.output
    return done


def test_each_documents_share_lies_beside_the_results(world: Path) -> None:
    run("demo", "--tasks", "heldout,quiz.yaml")
    [path] = (world / "runs/demo/eval").glob("*.documents.jsonl")
    results = json.loads(path.with_suffix("").with_suffix(".json").read_text(encoding="utf-8"))
    assert "samples" not in results
    found = documents.read(path)
    quiz = [document for document in found if document.task == "hellaswag"]
    assert [document.doc_id for document in quiz] == list(range(6))
    assert len({document.doc_hash for document in quiz}) == 6
    reported = results["results"]
    for metric in ("acc", "acc_norm"):
        assert sum(document.metrics[metric] for document in quiz) / 6 == reported["hellaswag"][f"{metric},none"]
    pairs = [document.metrics["bits_per_byte"] for document in found if document.task == "heldout"]
    bits = -sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs) / 0.6931471805599453
    assert bits == pytest.approx(reported["heldout"]["bits_per_byte,none"])
    assert not list((world / "runs/demo/eval").glob("*samples*"))


def test_samples_are_written_on_request(world: Path) -> None:
    run("demo", "--tasks", "quiz.yaml", "--limit", "2", "--log-samples")
    [path] = (world / "runs/demo/eval").glob("*.samples_hellaswag.jsonl")
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first["arguments"]["gen_args_0"] == {"arg_0": "The cat number 0 sat", "arg_1": "  on the mat"}
    assert (first["doc"]["gold"], first["target"], second["doc_id"]) == (0, "0", 1)


def test_two_models_are_compared_in_words(world: Path) -> None:
    done = run("demo", "other", "--tasks", "heldout,quiz.yaml")
    # 3 held-out documents and 6 questions are too few for a difference.
    assert "other/step_000007 against demo/step_000007: too few documents to tell at" in done.stdout
    assert "Noise is the variation from the choice of documents" in done.stdout
    assert "is better than" not in done.stdout
    found = json.loads(run("demo", "other", "--tasks", "heldout,quiz.yaml", "--json").stdout)
    figures = [{row["metric"]: row["value"] for row in model["results"]} for model in found["models"]]
    for comparison in found["comparisons"]:
        values = [model[comparison["metric"]] for model in figures]
        assert comparison["difference"] == pytest.approx(values[1] - values[0])
        assert comparison["better"] is None
    assert {comparison["metric"] for comparison in found["comparisons"]} == {"bits_per_byte", "acc", "acc_norm"}


def test_published_figures_stand_beside_the_run(world: Path) -> None:
    done = run("demo", "--tasks", "heldout,quiz.yaml", "--compare", "GPT2,mobilellm-125m")
    [line] = [line for line in done.stdout.splitlines() if "acc_norm" in line and "hellaswag" in line]
    assert line.split()[-4:] == ["0.389*", "(b)", "0.3114*", "(a)"]  # by tokens, unknown last
    [line] = [line for line in done.stdout.splitlines() if "bits_per_byte ↓" in line and "heldout" in line]
    assert line.split()[-2:] == ["–", "–"]
    assert "(b) MobileLLM README: MobileLLM's own script, 0-shot, metric not stated" in done.stdout
    found = json.loads(run("demo", "--tasks", "quiz.yaml", "--compare", "mobilellm-125m", "--json").stdout)
    [baseline] = found["baselines"]
    assert baseline["name"] == "mobilellm-125m"
    [figure] = baseline["figures"]
    assert (figure["value"], figure["beside"], figure["metric"]) == (0.389, "acc_norm", None)
    assert figure["differences"] == ["MobileLLM's own script", "metric not stated"]


def test_many_columns_break_between_figure_and_error(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "_width", 80)
    done = run("demo", "other", "--tasks", "quiz.yaml", "--compare", "gpt2,mobilellm-125m")
    [i] = [i for i, line in enumerate(done.stdout.splitlines()) if line.startswith(" hellaswag  acc_norm ↑")]
    line, below = done.stdout.splitlines()[i : i + 2]
    assert line.split()[-2:] == ["0.389*", "0.3114*"]
    assert below.split()[-2:] == ["(b)", "(a)"]
    assert below.count("± 0.") == 2


def test_columns_that_do_not_fit_stand_in_a_second_table(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "_width", 80)
    names = "gpt2,mobilellm-125m,smollm-135m,smollm2-135m,boris-2-preview-1,minueza-3-95m,cagliostro-v3"
    done = run("demo", "--tasks", "quiz.yaml", "--compare", names)
    rows = [line for line in done.stdout.splitlines() if line.startswith(" hellaswag  acc_norm ↑")]
    _, *figures = [word for row in rows for word in row.split() if word.startswith("0.")]
    assert figures == ["0.3014*", "0.4523*", "0.4251*", "0.427*", "0.389*", "0.4322", "0.3114*"]  # by tokens
    assert len(rows) > 1
    assert max(map(len, done.stdout.split("↑ higher")[0].splitlines())) <= 80


def test_a_model_among_the_names_is_measured_here(world: Path) -> None:
    found = json.loads(run("demo", "--tasks", "quiz.yaml", "--compare", "other,gpt2", "--json").stdout)
    assert [model["model"] for model in found["models"]] == ["demo/step_000007", "other/step_000007"]
    assert [baseline["name"] for baseline in found["baselines"]] == ["gpt2-124m"]
    assert len(found["comparisons"]) == 2


def test_an_unknown_name_is_one_message_before_anything_loads(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlm.convert.load.load_pretrained", lambda *_: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(app, ["demo", "--compare", "gtp2"])
    assert isinstance(done.exception, UsageError)
    assert "did you mean gpt2" in str(done.exception)
