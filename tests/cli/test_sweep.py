"""`lightlm sweep`: mistakes before anything runs, the table, and one real sweep that is stopped half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightlm.cli import sweep
from lightlm.runs.metrics import read_metrics
from tests.corpus import make_workspace
from tests.sweep.fleet import Fleet

GRID = ("tiny.yaml", "optimizer.lr=1e-2,3e-2", "eval.every=0", "eval.prompts=[]", "checkpoint.every=0")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("sweep-command"), 60)


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture
def fleet(monkeypatch):
    """Fake runs that end at the first look."""
    found = Fleet(seconds={})
    monkeypatch.setattr("lightlm.sweep.run.start_process", lambda *a: (found.start(*a), found.sleep(1e6))[0])
    monkeypatch.setattr("lightlm.sweep.engine._POLL_SECONDS", 0.001)
    return found


SHORT = (*GRID, "train.tokens=1000")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("name a recipe", "lightlm sweep recipes/demo.yaml")),
        (("optimizer.lr=1,2",), ("name a recipe",)),
        (("tiny.yaml", "optimizer.rate=1,2"), ("2 mistakes", "nothing has run", "optimizer.rate: unknown key")),
        (("tiny.yaml", "optimizer.lr=fast,1"), ("1 mistake", "'fast'")),
        (("tiny.yaml", "optimizer.lr=1,2", "--seeds", "2", "train.seed=1,2"), ("both choose seeds",)),
        (("tiny.yaml", "optimizer.betas=[0.9,0.95"), ("a ] is missing",)),
        (("tiny.yaml", "data.dataset=tiny,nowhere"), ("There is no data folder data/nowhere",)),
        (("tiny.yaml", "--budget", "2"), ("--budget 2: write a time such as",)),
        (("tiny.yaml", "--minutes", "0"), ("--minutes 0: it must be",)),
        (("tiny.yaml", "--minutes", "2", "train.tokens=1M"), ("both set the length",)),
        (("tiny.yaml", "--name", "a/b"), ("--name a/b",)),
        (("tiny.yaml", "optimizer.lr=1e-3..1e-2"), ("is a range; add --search N",)),
        (("tiny.yaml", "optimizer.lr=1e-2..1e-3", "--search", "3"), ("is an empty range",)),
        (("tiny.yaml", "optimizer.lr=1e-3", "--search", "3"), ("--search needs something to vary",)),
        (("tiny.yaml", "optimizer.lr=1e-3,1e-2", "--baseline", "2e-3"), ("--baseline 2e-3: no such contestant",)),
        (("tiny.yaml", "optimizer.lr=1,1e-2", "train.init_from=nowhere"), ("train.init_from:",)),
        (("tinny.yaml", "optimizer.lr=1,2"), ("no recipe at tinny.yaml",)),
        (("--show", "nothing"), ("no sweep at sweeps/nothing",)),
        (("tiny.yaml", "--show", "nothing"), ("takes no recipe",)),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(lightlm, fleet, arguments, parts):
    lightlm("sweep", *arguments).assert_one_message(*parts)
    assert fleet.started == []
    assert not list(Path("sweeps").glob("*"))


def test_a_search_without_optuna_says_how_to_get_it(lightlm, fleet, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = lightlm("sweep", *SHORT[:1], *SHORT[2:], "optimizer.lr=1e-3..1e-2", "--search", "3")
    outcome.assert_one_message("--search needs optuna; run", '--editable ".[search]"')


def test_a_search_prints_the_best_first(lightlm, fleet):
    pytest.importorskip("optuna", reason="optuna is not installed; it is in the extra [search]")
    outcome = lightlm("sweep", *SHORT[:1], *SHORT[2:], "optimizer.lr=1e-3..1e-2", "--search", "3", "--json")
    document = json.loads(outcome.stdout)
    assert document["contestants"][0]["name"] == "recipe"
    assert len(document["contestants"]) == 4
    assert document["folder"] == "sweeps/tiny-lr-search"


def test_a_dry_run_lists_the_runs_and_makes_nothing(lightlm, fleet):
    outcome = lightlm("sweep", *SHORT, "--seeds", "2", "--name", "dry", "--dry-run", "--json")
    plan = json.loads(outcome.stdout)
    assert [run["name"] for run in plan["runs"]] == [
        *("lr-1e-2_seed-7", "lr-3e-2_seed-7", "lr-1e-2_seed-8", "lr-3e-2_seed-8")
    ]
    assert "4 of 4 runs to go" in lightlm("sweep", *SHORT, "--seeds", "2", "--name", "dry", "--dry-run").stdout
    assert not Path("sweeps/dry").exists()


def test_the_table_the_plots_and_the_document(lightlm, fleet):
    fleet.losses = {"lr-3e-2_seed-7": 1.8, "lr-3e-2_seed-8": 1.81}
    outcome = lightlm("sweep", *SHORT, "--seeds", "2", "--name", "shown")
    assert outcome.code == 0, outcome.stderr
    rows = [line.split() for line in outcome.stdout.splitlines() if line.strip().startswith("lr=")]
    assert rows[0][:3] == ["lr=1e-2", "2", "2.0000"]
    assert rows[1][:5] == ["lr=3e-2", "2", "1.8050", "0.0071", "-0.1950"]
    assert (rows[0][-1], rows[1][-1]) == ("baseline", "better")
    assert "4/4" in outcome.stderr
    Path("sweeps/shown/results.json").unlink()
    document = json.loads(lightlm("sweep", "--show", "shown", "--json", "--baseline", "3e-2").stdout)
    assert not Path("sweeps/shown/results.json").exists()  # another's sweep need not be writable
    assert document["baseline"] == "lr=3e-2"
    assert document["contestants"][0]["difference"]["value"] == pytest.approx(0.195)
    for path in document["plots"].values():
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_recipes_of_any_alphabet_have_sweeps_of_their_own():
    folders = {sweep._folder(None, recipe, ["optimizer.lr"]) for recipe in ("实验.yaml", "训练.yaml", "demo")}
    assert len(folders) == 3
    assert Path("sweeps/demo-lr") in folders
    assert sweep._folder(None, "实验.yaml", []) != Path("sweeps")


def test_one_seed_gets_no_verdict(lightlm, fleet):
    outcome = lightlm("sweep", *SHORT, "--name", "single")
    assert "One seed: no test" in outcome.stdout
    assert "better" not in outcome.stdout.replace("lower is better", "")


def test_failed_runs_are_named_and_exit_with_1(lightlm, fleet):
    fleet.codes = {"lr-3e-2_seed-7": 1}
    outcome = lightlm("sweep", *SHORT, "--name", "failing")
    assert outcome.code == 1
    assert "no room at step 8" in outcome.stderr
    assert "1 of 2 runs failed; see sweeps/failing/logs" in outcome.stderr


def test_diverged_runs_are_a_result(lightlm, fleet):
    fleet.codes = {"lr-3e-2_seed-7": 3}
    outcome = lightlm("sweep", *SHORT, "--name", "diverging")
    assert outcome.code == 0
    assert next(line for line in outcome.stdout.splitlines() if "lr=3e-2" in line).split()[-1] == "diverged"


def test_another_sweep_of_this_name_is_refused(lightlm, fleet):
    assert lightlm("sweep", *SHORT).code == 0
    assert Path("sweeps/tiny-lr/sweep.json").is_file()  # named after recipe and key
    other = lightlm("sweep", *GRID, "train.tokens=2000")
    other.assert_one_message("train.tokens was 1000 and is 2000", "--name tiny-lr-2", "--overwrite")


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGTERM")
def test_a_real_sweep_that_is_stopped_half_way_finishes_what_is_missing(workspace):
    command = [sys.executable, "-m", "lightlm", "sweep", *GRID, "train.tokens=20K", "--name", "real"]
    runs = workspace / "sweeps/real/runs"
    with subprocess.Popen(
        command, cwd=workspace, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as first:
        second_run = runs / "lr-3e-2_seed-7/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (second_run.exists() and second_run.read_text().count("\n") > 3):
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        assert "Rerun the same command to resume" in first.communicate()[1]
    assert first.returncode == 130
    whole = (runs / "lr-1e-2_seed-7/metrics.jsonl").read_bytes()
    done = subprocess.run([*command, "--json"], cwd=workspace, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert [len(contestant["finals"]) for contestant in document["contestants"]] == [1, 1]
    assert (runs / "lr-1e-2_seed-7/metrics.jsonl").read_bytes() == whole  # not repeated
    resumed = read_metrics(runs / "lr-3e-2_seed-7")
    assert [row["step"] for row in resumed] == list(range(1, 80))
    assert sum("resumed" in row for row in resumed) == 1
    assert not (workspace / "runs").exists()  # nor any runs/latest
