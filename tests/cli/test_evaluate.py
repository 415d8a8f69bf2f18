import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lightlm.cli.evaluate import evaluate
from lightlm.device import pick_dtype
from lightlm.errors import LightLMError, UsageError
from lightlm.evaluate import runner
from lightlm.evaluate.tasks import manager
from lightlm.quantities import format_quantity
from tests.evaluate.tiny_run import write_world
from tests.report.run_folder import rows

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manager, "_OURS", {"heldout", "quiz.yaml"})  # skips lm-eval's index: 5 s
    write_world(tmp_path)
    return tmp_path


def test_the_newest_run_is_scored_and_the_results_lie_in_it(world: Path) -> None:
    done = CliRunner().invoke(app, ["--tasks", "heldout,quiz.yaml"])
    assert done.exit_code == 0, done.output
    for word in ("heldout", "bits_per_byte", "quiz", "acc_norm", "Stderr"):
        assert word in done.stdout
    assert "Note: the task heldout_cloze" in done.stderr  # three documents are too few
    [path] = (world / "runs" / "demo" / "eval").glob("*[!a].json")
    assert path.name == "step_000007_heldout+quiz.json"
    facts = json.loads(path.with_suffix(".meta.json").read_text())
    precision = str(pick_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    assert (facts["dtype"], facts["device"], facts["batch_size"]) == (precision, "cpu", "auto")
    assert facts["data"] == "data/tiny"
    weights = Path("runs/demo/checkpoints/step_000007/model.safetensors").read_bytes()
    assert facts["weights"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert facts["machine"]["processor"]
    assert facts["bos"]["before_contexts"] == []
    assert facts["bos"]["without_context"]["token"] == "<|endoftext|>"
    assert facts["data_sets"] == {"json": {"from": "files", "revision": None}}
    assert facts["working_directory_commit"] is None


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_followed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that trains deletes its older checkpoints, perhaps while lm-eval is imported."""
    checkpoints, plain = Path("runs/demo/checkpoints"), manager.Tasks.require_data

    def prune(tasks: manager.Tasks) -> None:
        (checkpoints / "step_000007").rename(checkpoints / "step_000008")
        plain(tasks)

    monkeypatch.setattr(manager.Tasks, "require_data", prune)
    done = CliRunner().invoke(app, ["demo", "--tasks", "heldout,quiz.yaml"])
    assert done.exit_code == 0, done.output
    assert Path("runs/demo/eval/step_000008_heldout+quiz.json").exists()


def test_a_named_precision_that_is_slow_here_is_noted(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlm.cpu.gain", lambda dtype, width: 0.125)
    done = CliRunner().invoke(app, ["--tasks", "quiz.yaml", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert "Note: --dtype bfloat16: products take 8.0 times" in done.stderr
    assert "products" not in CliRunner().invoke(app, ["--tasks", "quiz.yaml", "--dtype", "float32"]).stderr


def test_scores_enter_the_page_that_the_run_has(world: Path) -> None:
    run = Path("runs/demo")
    assert "report.html" not in CliRunner().invoke(app, ["--tasks", "quiz.yaml"]).stderr  # no page, and none is made
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    (run / "report.html").write_text("old")
    done = CliRunner().invoke(app, ["--tasks", "quiz.yaml"])
    assert done.stderr.endswith("runs/demo/report.html\n")
    assert "acc_norm" in (run / "report.html").read_text()
    (run / "metrics.jsonl").write_text("damaged}\n")
    done = CliRunner().invoke(app, ["--tasks", "quiz.yaml"])
    assert done.exit_code == 0
    assert "the report does not show the scores yet" in " ".join(done.stderr.split())


def test_a_token_before_prompts_gives_other_scores_in_a_file_of_its_own(world: Path) -> None:
    reports = {}
    for bos in ("auto", "yes", "no"):
        done = CliRunner().invoke(app, ["--tasks", "quiz.yaml", "--bos", bos, "--json"])
        [reports[bos]] = json.loads(done.stdout)["models"]
    assert reports["auto"]["results"] == reports["no"]["results"]
    assert [Path(report["file"]).name for report in reports.values()] == [
        "step_000007_quiz.json",
        "step_000007_quiz_bos.json",
        "step_000007_quiz_nobos.json",
    ]
    assert [len(report["bos"]["before_contexts"]) for report in reports.values()] == [0, 1, 0]


def test_a_mixture_of_experts_is_scored_with_what_a_token_costs(world: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False, "moe_intermediate_size": 8}
    table = 32 * write_world(world / "sparse", **experts).tokenizer.vocab_size
    dense, sparse = ["demo", "sparse/runs/demo"]
    done = CliRunner().invoke(app, [dense, "--tasks", "quiz.yaml", "--limit", "2"])
    assert "parameters" not in done.stdout
    done = CliRunner().invoke(app, [dense, sparse, "--tasks", "quiz.yaml", "--limit", "2", "--out", "scores"])
    assert done.exit_code == 0, done.output
    # A layer has 3,072 weights of attention, 128 of its router, 64 of norms, and 768 an expert; then the last norm.
    total, active = table + 2 * (3_264 + 4 * 768) + 32, table + 2 * (3_264 + 768) + 32
    # 6 for each active weight (the table is the head too; the last norm is left out), 12 x 32 x 40 positions a layer.
    flops = 6 * (active - 32) + 2 * 12 * 32 * 40
    words = f"{format_quantity(total)} parameters, {format_quantity(active)} active per token"
    assert f"{words}, {format_quantity(flops)} FLOPs per trained token" in done.stdout
    [file] = (world / "scores").glob("*sparse_runs_demo_*_quiz_limit2.meta.json")
    facts = json.loads(file.read_text())
    assert (facts["parameters"], facts["active_parameters"], facts["flops_per_token"]) == (total, active, flops)


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
    [line] = [line for line in done.stdout.splitlines() if "acc_norm" in line and "±" in line]
    assert line.count("±") == 2
    assert list((world / "scores").glob("demo_step_000007_quiz.json"))


def test_two_models_of_one_name_are_called_by_their_paths(world: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree("runs/demo/checkpoints/step_000007", Path(place, "model"))
    done = CliRunner().invoke(app, ["a/model", "b/model", "--tasks", "quiz.yaml", "--out", "scores", "--json"])
    assert done.exit_code == 0, done.output
    assert [model["model"] for model in json.loads(done.stdout)["models"]] == ["a/model", "b/model"]
    names = {path.name for path in Path("scores").glob("*.meta.json")}
    assert names == {"a_model_quiz.meta.json", "b_model_quiz.meta.json"}


def test_another_precision_and_other_data_are_other_files(world: Path) -> None:
    shutil.copytree("data/tiny", "data/else")
    for arguments in ([], ["--dtype", "float32"], ["--data", "else"]):
        done = CliRunner().invoke(app, ["demo", "--tasks", "heldout", *arguments])
        assert done.exit_code == 0, done.output
    names = {path.name for path in Path("runs/demo/eval").glob("*.json") if not path.name.endswith(".meta.json")}
    assert names == {f"step_000007_heldout{end}.json" for end in ("", "_float32", "_else")}


def test_results_that_are_not_stored_are_reported(world: Path) -> None:
    shutil.copytree("runs/demo/checkpoints/step_000007", "model")
    done = CliRunner().invoke(app, ["model", "--tasks", "quiz.yaml", "--log-samples"])
    assert "model does not belong to a run" in done.stderr
    assert "--out DIR" in done.stderr
    done = CliRunner().invoke(app, ["model", "--tasks", "quiz.yaml", "--out", "scores"])
    assert "not belong to a run" not in done.stderr
    again = ["model", "--tasks", "quiz.yaml", "--out", "scores"]
    done = CliRunner().invoke(app, again)
    assert isinstance(done.exception, UsageError)
    assert "scores/model_quiz.json exists already" in str(done.exception)
    assert CliRunner().invoke(app, [*again, "--overwrite"]).exit_code == 0


def test_a_model_in_a_folder_called_checkpoints_is_no_run(world: Path) -> None:
    shutil.copytree("runs/demo/checkpoints/step_000007", "checkpoints/model")
    done = CliRunner().invoke(app, ["checkpoints/model", "--tasks", "quiz.yaml"])
    assert done.exit_code == 0, done.output
    assert "model does not belong to a run" in done.stderr
    assert not Path("eval").exists()


def test_a_run_that_permits_no_writing_is_known_before_scoring(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("runs/demo/eval").write_text("")  # root may write everywhere
    monkeypatch.setattr(runner, "run_tasks", lambda *_, **__: pytest.fail("the model was scored"))
    done = CliRunner().invoke(app, ["demo", "--tasks", "quiz.yaml"])
    assert isinstance(done.exception, UsageError)
    assert "runs/demo/eval is a file, not a folder; give --out DIR" in str(done.exception)


def test_a_run_with_the_name_of_published_figures_is_noted(world: Path) -> None:
    shutil.copytree("runs/demo", "runs/gpt2")
    done = CliRunner().invoke(app, ["demo", "--tasks", "quiz.yaml", "--compare", "gpt2"])
    assert "--compare gpt2 means published figures of gpt2" in done.stderr
    assert "./runs/gpt2" in done.stderr


def test_samples_of_replaced_results_are_removed(world: Path) -> None:
    arguments = ["demo", "--tasks", "quiz.yaml"]
    assert CliRunner().invoke(app, [*arguments, "--log-samples"]).exit_code == 0
    assert list(Path("runs/demo/eval").glob("*.samples_quiz.jsonl"))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert not list(Path("runs/demo/eval").glob("*.samples_quiz.jsonl"))


def test_an_evaluation_outlives_the_checkpoint_that_it_scores(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run saves a newer one and deletes this one while it is scored."""
    score, folder = runner.run_tasks, Path("runs/demo/checkpoints/step_000007")

    def pruned(*args: Any, **settings: Any) -> Any:
        shutil.rmtree(folder)
        return score(*args, **settings)

    monkeypatch.setattr(runner, "run_tasks", pruned)
    assert CliRunner().invoke(app, ["demo", "--tasks", "quiz.yaml"]).exit_code == 0
    facts = json.loads(Path("runs/demo/eval/step_000007_quiz.meta.json").read_text())
    assert len(facts["weights"]["model.safetensors"]) == 64


def test_one_results_file_cannot_hold_two_models(world: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "demo", "--tasks", "heldout", "--out", "scores.json"])
    assert isinstance(done.exception, UsageError)


def test_a_model_that_is_not_there_is_one_message(world: Path) -> None:
    for models, task in ((["runs/nothing"], "heldout"), (["demo", "runs/nothing"], "quiz.yaml")):
        done = CliRunner().invoke(app, [*models, "--tasks", task])
        assert isinstance(done.exception, LightLMError)
        assert "nothing" in str(done.exception)
    assert not Path("runs/demo/eval").exists()  # it was missed before the first was scored


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "taken"], "taken is a file"),
        (["--out", "taken/deep/scores.json"], "taken is a file"),
        (["--out", "folder.json"], "folder.json is a folder"),
        (["--batch-size", "many"], "--batch-size many: give a number"),
        (["--batch-size", "0"], "--batch-size 0: give a number"),
        (["--num-fewshot", "2"], "--num-fewshot 2: the task heldout"),
        (
            ["--num-fewshot", "2", "--tasks", "fixed.yaml"],
            "--num-fewshot 2: no examples can stand in the prompt of fixed",
        ),
        (["--data", "nowhere", "--tasks", "quiz.yaml"], "--data nowhere: only heldout"),
        (["--bos", "maybe"], "--bos maybe"),
        (["--data-dir", "nowhere"], "nowhere is not a folder"),
        (["--include-path", "taken"], "taken is not a folder"),
    ],
)
def test_mistakes_are_found_before_the_model_loads(
    world: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    Path("taken").write_text("")
    Path("folder.json").mkdir()
    quiz = Path("quiz.yaml").read_text()
    Path("fixed.yaml").write_text(quiz.replace("task: quiz", "task: fixed\nnum_fewshot: 0"))
    monkeypatch.setattr("lightlm.convert.load.load_pretrained", lambda *_: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(app, ["demo", *arguments])
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)


def test_heldout_of_runs_with_different_data_needs_a_folder_for_both(world: Path) -> None:
    shutil.copytree("runs/demo", "runs/other [b]", symlinks=True)
    shutil.copytree("data/tiny", "data/else")
    Path("runs/other [b]/recipe.yaml").write_text("data: {dataset: else}\n")
    done = CliRunner().invoke(app, ["demo", "other [b]"])
    assert isinstance(done.exception, UsageError)
    for part in ("data/tiny", "data/else", "--data"):
        assert part in str(done.exception)
    done = CliRunner().invoke(app, ["demo", "other [b]", "--data", "else", "--out", "scores"], terminal_width=200)
    assert done.exit_code == 0, done.output
    assert "[b]" in done.stdout
    facts = [json.loads(path.read_text())["data"] for path in Path("scores").glob("*.meta.json")]
    assert facts == ["data/else"] * 2
