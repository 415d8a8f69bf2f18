"""`lightlm runs`: folders in each state, without a training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightlm import files
from lightlm.runs import find_run, locked

NAMES = ("complete", "stopped", "interrupted", "fresh", "damaged", "unreadable")


def make_run(name, target=3000, logged=3, saved=3, metrics=None):
    run = Path("runs") / name
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"train: {{tokens: {target}}}")
    lines = [{"step": n, "tokens": 1000 * n, "loss": 4 - n / 10} for n in range(1, logged + 1)]
    if lines:
        lines[0]["val_loss"] = 3.5
    text = "".join(json.dumps(line) + "\n" for line in lines) if metrics is None else metrics
    (run / "metrics.jsonl").write_text(text)
    if saved:
        folder = run / "checkpoints" / f"step_{saved:06d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x" * 1000)
        (folder / "complete.json").write_text(json.dumps({"files": {"weights": {"bytes": 1000, "xxh3": ""}}}))
    return run


@pytest.fixture(autouse=True)
def _runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("complete")
    make_run("stopped", target="3M")
    make_run("interrupted", target=5000, saved=2)
    make_run("fresh", logged=0, saved=0)
    damaged = make_run("damaged")
    (damaged / "checkpoints/step_000003/weights").write_bytes(b"x" * 999)
    make_run("unreadable", metrics="{}}\n")
    for age, name in enumerate(reversed(NAMES)):
        for path in (Path("runs") / name).glob("*"):
            os.utime(path, (1e9 + age, 1e9 + age))
    files.point_to(Path("runs/latest"), "stopped")
    Path("runs/compare-a-b").mkdir()


def test_ls_tells_the_state_of_every_run_newest_first(lightlm):
    with locked(Path("runs/fresh")):
        found = json.loads(lightlm("runs", "ls", "--json").stdout)
    assert [run["name"] for run in found] == list(NAMES)
    states = {run["name"]: run["state"] for run in found}
    assert states == {
        "complete": "complete",
        "stopped": "stopped",
        "interrupted": "interrupted",
        "fresh": "training",
        "damaged": "damaged",
        "unreadable": "damaged",
    }
    by_name = {run["name"]: run for run in found}
    assert by_name["fresh"]["trainer"]["pid"] == os.getpid()
    stopped = by_name["stopped"]
    assert (stopped["step"], stopped["tokens"], stopped["target_tokens"]) == (3, 3000, 3_000_000)
    assert (stopped["loss"], stopped["val_loss"]) == (3.7, 3.5)
    assert stopped["size"] == sum(path.stat().st_size for path in Path("runs/stopped").rglob("*") if path.is_file())
    assert stopped["modified"].startswith("2001-09-09T01:46:4")
    table = lightlm("runs", "ls").stdout
    assert "interrupted" in table
    assert "3K of 3M" in table


def test_half_a_line_after_a_kill_is_passed_over(lightlm):
    with Path("runs/stopped/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    [stopped] = [run for run in json.loads(lightlm("runs", "ls", "--json").stdout) if run["name"] == "stopped"]
    assert (stopped["step"], stopped["state"]) == (3, "stopped")


def test_ls_without_runs(lightlm, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    outcome = lightlm("runs", "ls")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "No runs in" in outcome.stderr
    assert lightlm("runs", "ls", "--json").stdout == "[]\n"


@pytest.mark.parametrize(("size", "shown"), [(999, "999 bytes"), (999_999, "1 MB"), (1_500_000_000_000, "1,500 GB")])
def test_a_size_is_never_a_power_of_ten(lightlm, monkeypatch, size, shown):
    monkeypatch.setattr("lightlm.runs.listing.disk_bytes", lambda run: size)
    assert f"runs/damaged: {shown}\n" in lightlm("runs", "rm", "damaged", "--yes").stderr


def test_rm_deletes_and_mends_latest(lightlm):
    outcome = lightlm("runs", "rm", "stopped", "runs/interrupted", "--yes")
    assert outcome.code == 0
    assert "runs/stopped: 1.21 kB" in outcome.stderr
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "compare-a-b", "complete", "damaged", "fresh", "latest", "unreadable"
    ]  # fmt: skip
    assert find_run() == Path("runs/complete")


def test_rm_latest_deletes_the_run_that_it_points_to(lightlm):
    assert lightlm("runs", "rm", "latest", "--yes").code == 0
    assert not Path("runs/stopped").exists()


@pytest.mark.parametrize(("answer", "deleted"), [("y", True), ("n", False), ("", False)])
def test_rm_asks(lightlm, monkeypatch, answer, deleted):
    monkeypatch.setattr("typer.confirm", lambda *_, **__: answer == "y")
    monkeypatch.setattr("lightlm.cli.runs._answers", lambda: True)
    assert lightlm("runs", "rm", "stopped").code == (0 if deleted else 1)
    assert Path("runs/stopped").exists() != deleted


def test_rm_without_anyone_to_ask_deletes_nothing(lightlm):
    outcome = lightlm("runs", "rm", "stopped")
    assert outcome.code == 2
    assert "--yes" in outcome.stderr
    assert Path("runs/stopped").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("compare-a-b", "runs/compare-a-b is not a run"),
        ("nothing", "runs/nothing is not a run"),
        ("runs", "runs/runs is not a run"),
        (".", "does not lie in runs"),
        ("..", "does not lie in runs"),
        ("../elsewhere", "does not lie in runs"),
        ("runs/stopped/checkpoints", "does not lie in runs"),
    ],
)
def test_rm_refuses_what_is_not_a_run_here_and_then_deletes_nothing(lightlm, name, message):
    Path("recipe.yaml").write_text("train: {tokens: 1}")  # the folder here is not a run
    before = sorted(Path().rglob("*"))
    lightlm("runs", "rm", "stopped", name, "--yes").assert_one_message(message)
    assert sorted(Path().rglob("*")) == before


def test_rm_refuses_a_run_that_is_trained_and_then_deletes_nothing(lightlm):
    with locked(Path("runs/stopped")):
        lightlm("runs", "rm", "complete", "stopped", "--yes").assert_one_message("runs/stopped is being trained")
    assert Path("runs/complete").is_dir()


def test_rm_of_a_link_keeps_what_it_leads_to(lightlm, tmp_path):
    Path("runs/stopped").rename(tmp_path / "big-disk")
    Path("runs/stopped").symlink_to(tmp_path / "big-disk")
    outcome = lightlm("runs", "rm", "stopped", "--yes")
    assert "the folder that it leads to stays" in outcome.stderr
    assert (tmp_path / "big-disk/recipe.yaml").is_file()
    assert not os.path.lexists("runs/stopped")


def test_path_prints_only_the_folder(lightlm):
    assert lightlm("runs", "path").stdout == f"{Path('runs/stopped')}\n"
    assert lightlm("runs", "path", "complete").stdout == f"{Path('runs/complete')}\n"
    lightlm("runs", "path", "nothing").assert_one_message("no run at nothing")


def test_the_commands_import_no_torch():
    for command in (["ls"], ["path"], ["rm", "fresh", "--yes"]):
        code = f"import sys; from lightlm.cli.app import app; app(['runs', *{command}], standalone_mode=False); "
        code += "sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
