"""`lightlm train` and the runs that exist: locks, replacing, moved data, edited recipes, full disks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightlm import checkpoint
from lightlm.data.prepare.run import prepare
from lightlm.runs import holder, locked
from tests.corpus import make_workspace

SHORT = ("tiny.yaml", "train.tokens=1280", "eval.every=0", "eval.prompts=[]")  # 5 steps


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("runs-command"), 100)


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def finished(workspace):
    """A run of 5 steps."""
    command = [sys.executable, "-m", "lightlm", "train", *SHORT, "--name", "finished"]
    subprocess.run(command, cwd=workspace, check=True, capture_output=True)
    return workspace / "runs/finished"


@pytest.fixture
def run(finished):
    """A copy of `finished` to be changed."""
    copy = Path("runs/copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished, copy, symlinks=True)
    return copy


def contents(folder):
    """Every file but those of the lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name}


def edit(run, section, **values):
    path = run / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe[section] |= values
    path.write_text(yaml.safe_dump(recipe))


def steps(run):
    return len((run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--resume", "copy"),
        ("--resume", "copy", "--nproc", "2"),
        ("tiny.yaml", "--name", "copy", "--auto-resume"),
        ("tiny.yaml", "--name", "copy", "--overwrite"),
    ],
)
def test_a_run_that_is_trained_is_left_alone(lightlm, run, arguments):
    with locked(run):
        before = contents(run)
        outcome = lightlm("train", *arguments)
        assert "runs/copy is being trained by process" in outcome.stderr
        assert outcome.code == 1
        assert contents(run) == before
    assert lightlm("train", "--resume", "copy", "--dry-run").code == 0


def test_training_holds_the_lock_to_its_end_and_reading_needs_none(lightlm, workspace, monkeypatch):
    seen = []

    def sample(model, tokenizer, *args, **kwargs):
        seen.append(holder(Path("runs/locked")) is not None)
        return "..."

    monkeypatch.setattr("lightlm.train.evaluations.sample_text", sample)
    lightlm("train", "tiny.yaml", "train.tokens=512", "--name", "locked")
    assert seen == [True]
    run = workspace / "runs/locked"
    assert holder(run) is None
    with locked(run):
        for command in (["eval", "locked"], ["generate", "The", "--checkpoint", "locked", "--max-new-tokens", "2"]):
            assert lightlm(*command).code == 0, command
        for command in (["report", "locked"], ["convert", "locked"]):
            assert lightlm(*command).code == 0, command


def test_overwriting_deletes_the_run_once_recipe_and_data_fit(lightlm, run):
    before = contents(run)
    for wrong in ("data.dataset=nothing", "model.vocab_size=12", "optimizer.lr=fast"):
        assert lightlm("train", *SHORT, wrong, "--name", "copy", "--overwrite").code == 1
        assert contents(run) == before
    assert lightlm("train", *SHORT, "--name", "copy", "--overwrite", "--dry-run").code == 0
    assert contents(run) == before
    assert lightlm("train", *SHORT, "train.tokens=512", "--name", "copy", "--overwrite").code == 0
    assert steps(run) == 2
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_000002"]


def test_an_unfinished_run_of_the_name_is_mentioned(lightlm, run):
    edit(run, "train", tokens=2560)
    outcome = lightlm("train", *SHORT, "name=copy")
    assert "runs/copy is at step 5 of 10; resume it with `lightlm train --resume copy`. This run is runs/copy-2" in (
        " ".join(outcome.stderr.split())
    )
    shutil.rmtree("runs/copy-2")
    edit(run, "train", tokens=1280)
    assert "is at step" not in lightlm("train", *SHORT, "name=copy").stderr
    edit(Path("runs/copy-2"), "train", tokens=2560)
    outcome = lightlm("train", *SHORT, "name=copy")
    assert "resume it with `lightlm train --resume copy-2`. This run is runs/copy-3" in " ".join(outcome.stderr.split())
    shutil.rmtree("runs/copy-2")
    shutil.rmtree("runs/copy-3")


def test_moved_data_is_named_anew(lightlm, run, workspace):
    shutil.move("data/tiny", "elsewhere")
    try:
        resume = ["train", "--resume", "copy", "train.tokens=1536"]
        lightlm(*resume).assert_one_message("no data folder data/tiny, on which runs/copy", "data.dataset=PATH")
        evaluated = lightlm("eval", "copy")
        assert evaluated.code == 1
        assert "no folder data/tiny; if it has moved, say where it is with --data DIR" in (
            " ".join(evaluated.stderr.split())
        )
        assert lightlm(*resume, "data.dataset=./elsewhere").code == 0
        assert yaml.safe_load((run / "recipe.yaml").read_text())["data"]["dataset"] == "./elsewhere"
        assert lightlm("train", "--resume", "copy", "train.tokens=1792").code == 0
        assert steps(run) == 7
    finally:
        shutil.move("elsewhere", "data/tiny")


def test_other_data_is_refused(lightlm, run, workspace):
    prepare(str(workspace / "tiny.jsonl"), "train:320", workspace / "data/other", val_fraction=0.3)
    before = contents(run)
    outcome = lightlm("train", "--resume", "copy", "train.tokens=1536", "data.dataset=other")
    outcome.assert_one_message("data/other is not the data that", "step_000005 was trained on", "data.dataset=PATH")
    assert contents(run) == before


def test_a_run_moved_elsewhere_is_resumed_and_read_by_its_path(lightlm, run, tmp_path, workspace, monkeypatch):
    """Copied as by a tool that follows links, into another folder, with the path of another system in the recipe."""
    shutil.copytree(run, tmp_path / "from windows", symlinks=False)
    shutil.copytree("data/tiny", tmp_path / "tokens")
    moved = tmp_path / "from windows"
    edit(moved, "data", dataset="C:\\data\\tiny")
    monkeypatch.chdir(tmp_path)
    lightlm("train", "--resume", str(moved), "train.tokens=1536").assert_one_message("C:\\data\\tiny", "PATH")
    assert lightlm("train", "--resume", str(moved), "train.tokens=1536", "data.dataset=./tokens").code == 0
    assert steps(moved) == 6
    assert lightlm("eval", str(moved)).code == 0
    assert lightlm("report", str(moved)).code == 0
    assert lightlm("generate", "The", "--checkpoint", str(moved), "--max-new-tokens", "2").code == 0


def test_an_edited_recipe_is_followed_and_named(lightlm, run):
    edit(run, "optimizer", lr=0.002)
    edit(run, "checkpoint", keep_last=7)
    outcome = lightlm("train", "--resume", "copy", "train.tokens=1536")
    text = " ".join(outcome.stderr.split())
    assert "optimizer.lr is 0.002 in runs/copy/recipe.yaml, 0.01 in step_000005" in text
    assert "checkpoint.keep_last is 7 in runs/copy/recipe.yaml, 2 in step_000005" in text
    assert "train.tokens is" not in text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lr"] < 0.002
    assert "has changed" not in lightlm("train", "--resume", "copy", "train.tokens=1792").stderr


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"num_layers": 3}),
        ("model", {"rope_theta": 5.0}),
        ("train", {"seed": 8}),
        ("train", {"batch_tokens": 512}),
    ],
)
def test_an_edit_that_cannot_be_followed_is_refused_by_name(lightlm, run, section, change):
    edit(run, section, **change)
    before = contents(run)
    [(key, value)] = change.items()
    outcome = lightlm("train", "--resume", "copy", "train.tokens=1536")
    outcome.assert_one_message(f"{section}.{key} cannot change", f"is {value} in runs/copy/recipe.yaml", "step_000005")
    assert contents(run) == before


def test_a_long_override_of_a_resumed_run_is_not_taken_for_a_path(lightlm, run):
    outcome = lightlm("train", "--resume", "copy", f"eval.prompts=[{'a ' * 200}]")
    outcome.assert_one_message("eval.prompts")
    assert "too long" not in outcome.stderr, outcome.stderr


def test_a_recipe_that_only_a_resumed_run_may_have_is_read_from_its_checkpoint(lightlm, run):
    for more in (["eval.every=256", "checkpoint.keep_best=true"], ["eval.every=0"], []):
        steps = len((run / "metrics.jsonl").read_text().splitlines()) + 1
        outcome = lightlm("train", "--resume", "copy", f"train.tokens={256 * steps}", *more)
        assert outcome.code == 0, outcome.stderr
        assert "does not say which recipe it was trained with" not in outcome.stderr


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_note(lightlm, run, monkeypatch):
    monkeypatch.setattr("lightlm.train.checkpointing.resume._recorded_recipe", lambda folder: None)
    edit(run, "optimizer", lr=0.002)
    outcome = lightlm("train", "--resume", "copy", "train.tokens=1536")
    assert outcome.code == 0
    assert "does not say which recipe it was trained with" in outcome.stderr


def test_restarted_processes_name_the_run_of_the_first_attempt(lightlm, workspace, monkeypatch):
    """The folder is claimed before the processes start, and removed if they fail before a run begins."""
    started = []

    def launch(first, again, *rest):
        started.append((first, again, Path("runs/restarted").is_dir()))
        return 1

    monkeypatch.setattr("lightlm.cli.train.launch", launch)
    assert lightlm("train", "tiny.yaml", "name=restarted", "--max-restarts", "1").code == 1
    [(first, again, claimed)] = started
    assert claimed
    assert "--name=restarted" in first
    assert {"--name=restarted", "--auto-resume"} <= set(again)
    assert not Path("runs/restarted").exists()
    lightlm("train", "tiny.yaml", "--name", "restarted", "--overwrite", "--max-restarts", "1")
    first, again, _ = started[1]
    assert "--overwrite" in first
    assert "--overwrite" not in again


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.init_from=finished",),
        ("train.init_from=finished", "model={}"),
        ("train.distill={teacher: finished, weight: 0.5}",),
    ],
)
def test_the_same_command_resumes_a_run_that_names_a_model(lightlm, finished, overrides):
    """The run's recipe names the model's checkpoint and has its shape."""
    name = f"again{len(''.join(overrides))}"
    command = ("train", *SHORT, *overrides, "--name", name, "--auto-resume", "--no-report")
    assert lightlm(*command).code == 0
    assert lightlm("train", "--resume", name, "train.tokens=1536", "--no-report").code == 0
    repeated = lightlm(*command)
    assert repeated.code == 0, repeated.stderr
    assert "step 6" in repeated.stdout
    recipe = yaml.safe_load(Path("runs", name, "recipe.yaml").read_text())
    assert recipe["train"]["tokens"] == 1536  # as --resume said since, and not as the command did at first
    other = lightlm(*command, "model.num_layers=3")
    assert other.code == 1
    assert "model.num_layers cannot change" in other.stderr


def test_resuming_a_complete_run_says_nothing_of_its_rate(lightlm, finished):
    outcome = lightlm("train", "--resume", "finished", "--no-report")
    assert outcome.code == 0
    assert "learning rate" not in outcome.stderr + outcome.stdout.partition("Run ")[0]


def test_a_run_in_another_folder_leaves_latest_alone_and_draws_nothing_if_asked(lightlm, finished):
    before = Path("runs/latest").readlink()
    outcome = lightlm("train", *SHORT, "--name", "aside", "--runs-dir", "elsewhere/runs", "--no-report")
    assert outcome.code == 0, outcome.stderr
    run = Path("elsewhere/runs/aside")
    assert (run / "recipe.yaml").is_file()
    assert not (run / "report.html").exists()
    assert Path("runs/latest").readlink() == before
    assert not Path("runs/aside").exists()
    again = lightlm("train", *SHORT, "--name", "aside", "--runs-dir", "elsewhere/runs")
    again.assert_one_message("elsewhere/runs/aside exists already")
    assert lightlm("train", "--resume", "elsewhere/runs/aside").code == 0


def test_a_run_that_diverges_has_an_exit_code_of_its_own(lightlm):
    """`lightlm sweep` counts it as a result, not as a failure to be tried again."""
    outcome = lightlm("train", *SHORT, "--name", "diverges", "optimizer.lr=1e30", "train.grad_clip=0")
    assert "training diverged at step" in outcome.stderr
    assert outcome.code == 3
