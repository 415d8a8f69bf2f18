import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lightlm.cli.evaluate import evaluate
from lightlm.errors import LightLMError, UsageError
from lightlm.evaluate import runner
from tests.evaluate.tiny_run import write_world

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_OURS", {"heldout", "quiz.yaml"})  # spares 6 s: lm-eval's thousands of files
    write_world(tmp_path)
    return tmp_path


def test_the_newest_run_is_scored_and_the_results_lie_in_it(world: Path) -> None:
    done = CliRunner().invoke(app, ["--tasks", "heldout,quiz.yaml"])
    assert done.exit_code == 0, done.output
    for word in ("heldout", "bits_per_byte", "quiz", "acc_norm", "Stderr"):
        assert word in done.stdout
    [path] = (world / "runs" / "demo" / "eval").glob("*[!a].json")
    assert path.name == "step_000007_heldout+quiz.json"
    facts = json.loads(path.with_suffix(".meta.json").read_text())
    assert (facts["dtype"], facts["device"], facts["batch_size"]) == ("float32", "cpu", "auto")


def test_json_is_the_only_thing_printed(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(app, ["runs/demo", "--tasks", "quiz.yaml", "--limit", "3", "--batch-size", "2", "--json"])
    [model] = json.loads(done.stdout)["models"]
    assert model["model"] == "demo/step_000007"
    assert {(row["task"], row["metric"], row["documents"]) for row in model["results"]} == {
        ("quiz", "acc", 3),
        ("quiz", "acc_norm", 3),
    }
    assert Path(model["file"]).name == "step_000007_quiz_limit3.json"
    captured = capfd.readouterr()  # what libraries and child processes write past Python's streams
    assert captured.out == captured.err == ""


def test_several_models_stand_side_by_side(world: Path) -> None:
    checkpoint = "runs/demo/checkpoints/step_000007"
    done = CliRunner().invoke(app, ["demo", checkpoint, "--tasks", "quiz.yaml", "--out", "scores"], terminal_width=200)
    assert done.exit_code == 0, done.output
    [line] = [line for line in done.stdout.splitlines() if "acc_norm" in line]
    assert line.count("±") == 2
    assert list((world / "scores").glob("demo_step_000007_quiz.json"))


def test_one_results_file_cannot_hold_two_models(world: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "demo", "--tasks", "heldout", "--out", "scores.json"])
    assert isinstance(done.exception, UsageError)


def test_a_model_that_is_not_there_is_one_message(world: Path) -> None:
    done = CliRunner().invoke(app, ["runs/nothing", "--tasks", "heldout"])
    assert isinstance(done.exception, LightLMError)
    assert "nothing" in str(done.exception)
