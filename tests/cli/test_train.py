import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lightlm.data.folder import DataFolder
from tests.corpus import TINY_RECIPE, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("train-command"), 100)


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def test_dry_run_prints_the_plan_and_leaves_nothing(lightlm, workspace):
    outcome = lightlm("train", "tiny.yaml", "train.tokens=2560", "--dry-run", "--json")
    plan = json.loads(outcome.stdout)
    assert (plan["steps"], plan["accumulation"], plan["parameters"]) == (10, 4, 28_832)
    table = lightlm("train", "tiny.yaml", "train.tokens=2560", "--dry-run").stdout
    assert re.search(r"parameters\W+28,832\b", table)
    assert re.search(r"compile\W+no\b", table)
    assert not (workspace / "runs").exists()


def test_a_dry_run_needs_no_data_and_a_run_does(lightlm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = lightlm("train", "demo", "--dry-run", "--json")
    plan = json.loads(outcome.stdout)
    assert (plan["steps"], plan["train_tokens"], plan["epochs"]) == (733, None, None)
    assert plan["parameters"] == 6_849_036 + (50_257 - 8192) * 256
    for words in ("data/pydocs is not prepared yet", "lightlm prepare-data pydocs", "vocabulary of 50,257"):
        assert words in outcome.stderr.replace("\n", " ")
    table = lightlm("train", "demo", "model.vocab_size=8192", "--dry-run")
    assert re.search(r"parameters\W+6,849,036\b", table.stdout)
    assert "epochs" not in table.stdout
    assert "50,257" not in table.stderr
    lightlm("train", "demo").assert_one_message("There is no data folder data/pydocs", "lightlm prepare-data pydocs")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_experts_counts_what_is_active(lightlm):
    experts = ["model.num_experts=4", "model.num_experts_per_tok=2", "model.moe_intermediate_size=16"]
    plan = json.loads(lightlm("train", "tiny.yaml", *experts, "--dry-run", "--json").stdout)
    assert plan["parameters"] - plan["active_parameters"] == 2 * 2 * 3 * 16 * 32  # two idle experts in two layers
    table = lightlm("train", "tiny.yaml", *experts, "--dry-run").stdout
    assert re.search(rf"active parameters\W+{plan['active_parameters']:,}\b", table)
    assert re.search(rf"flops per token\W+{plan['flops_per_token']:,}\b", table)
    assert "active parameters" not in lightlm("train", "tiny.yaml", "--dry-run").stdout


def test_plain_log_has_no_carriage_returns_and_json_stands_alone(lightlm, workspace):
    outcome = lightlm("train", "tiny.yaml", "train.tokens=512", "--json", "--name", "plain")
    result = json.loads(outcome.stdout)
    assert (result["step"], result["interrupted"]) == (2, False)
    assert "\r" not in outcome.stderr
    assert "validation" in outcome.stderr
    assert (workspace / "runs/latest").resolve().name == "plain"


def test_second_run_gets_a_number_and_a_taken_name_is_refused(lightlm, workspace):
    for expected in ("again", "again-2"):
        lightlm("train", "tiny.yaml", "train.tokens=256", "name=again")
        assert (workspace / "runs" / expected / "metrics.jsonl").is_file()
    taken = lightlm("train", "tiny.yaml", "--name", "again")
    taken.assert_one_message("runs/again exists already", "--resume runs/again", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "runs/plain", "--name", "x"], "leave --name out"),
        (["--resume", "runs/plain", "--auto-resume"], "leave --auto-resume out"),
        (["--resume", "runs/plain", "--overwrite"], "--overwrite deletes the run"),
        (["tiny.yaml", "--auto-resume", "--overwrite"], "--overwrite deletes the run"),
        (["tiny.yaml", "--auto-resume", "--name", "latest"], "cannot name a run"),
        (["tiny.yaml", "--resume", "runs/plain"], "leave RECIPE out"),
        ([], "name a recipe"),
        (["tiny.yaml", "--name", "../elsewhere"], "cannot name a run"),
        (["tiny.yaml", "--name", "latest"], "cannot name a run"),
        (["tiny.yaml", "train.device=tpu"], "unknown device 'tpu'"),
        (["tiny.yaml", "optimizer.lr"], "write key=value"),
    ],
)
def test_contradictions_are_refused(lightlm, arguments, message):
    lightlm("train", *arguments).assert_one_message(message)


def test_a_recipe_that_cannot_be_exported_says_so(lightlm):
    outcome = lightlm("train", "tiny.yaml", "model.mlp=relu2", "model.qk_norm=true", "--dry-run")
    assert "cannot be exported to Hugging Face" in outcome.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", None)])
def test_a_real_process_stops_cleanly_and_resumes_to_the_same_losses(lightlm, workspace, number):
    """The command in a process of its own, interrupted at whatever point the signal finds it."""
    name = f"signal-{number}"
    command = [sys.executable, "-m", "lightlm", "train", "tiny.yaml", "train.tokens=12800", "--name"]
    process = subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True)
    metrics = workspace / "runs" / name / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"lightlm train --resume runs/{name}" in log
    assert "Traceback" not in log
    done = metrics.read_text().count("\n")
    assert 3 <= done < 50
    assert lightlm("train", "--resume").code == 0
    if not (workspace / "runs/straight").exists():
        subprocess.run([*command, "straight"], check=True, capture_output=True)

    def losses(run):
        lines = (workspace / "runs" / run / "metrics.jsonl").read_text().splitlines()
        return [(m["step"], m["loss"], m["grad_norm"], m.get("val_loss")) for m in map(json.loads, lines)]

    assert len(losses("straight")) == 50
    assert losses(name) == losses("straight")


def test_resume_accepts_overrides_without_a_recipe(lightlm, workspace):
    lightlm("train", "tiny.yaml", "train.tokens=256", "--name", "longer")
    assert lightlm("report", "longer", "--compare", "gpt2").code == 0
    assert lightlm("train", "train.tokens=512", "--resume", "longer").code == 0
    assert 'name="lightlm-compare" content="gpt2-124m"' in (workspace / "runs/longer/report.html").read_text("utf-8")
    assert yaml.safe_load((workspace / "runs/longer/recipe.yaml").read_text())["train"]["tokens"] == 512
    metrics = [json.loads(line) for line in (workspace / "runs/longer/metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in metrics if row.get("resumed")] == [metrics[len(metrics) // 2]["tokens"]]


def test_the_suggested_prompt_is_a_text_of_the_run_s_own_data(lightlm, workspace):
    result = lightlm("train", "tiny.yaml", "train.tokens=256", "--name", "hinted")
    [line] = [line for line in result.stdout.splitlines() if line.startswith("Next: ")]
    [prompt] = [shlex.split(part)[2] for part in line.removeprefix("Next: ").split("; ") if "generate" in part]
    assert DataFolder.open(workspace / "data/tiny").beginnings(1)[0].startswith(prompt)
    assert len(prompt.split()) == 4


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_auto_resume_starts_a_run_that_does_not_exist_and_resumes_one_that_does(lightlm, workspace):
    """The same command again and again, as a requeued job runs it; the recipe is shorter at first, as if killed."""
    command = ["tiny.yaml", "--name", "requeued", "--auto-resume"]
    first = lightlm("train", *command, "train.tokens=1280")
    assert first.code == 0
    assert "is resumed" not in first.stderr
    run = workspace / "runs/requeued"
    begun = losses(run)
    again = lightlm("train", *command, "train.tokens=2560")
    assert again.code == 0
    assert "runs/requeued exists and is resumed with its own recipe" in again.stderr
    assert "resumed after step 5" in again.stderr
    assert len(losses(run)) == 10
    assert losses(run)[:5] == begun
    assert not (workspace / "runs/requeued-2").exists()


def test_auto_resume_applies_what_the_script_did_not_say_the_last_time(lightlm, workspace):
    command = ["train", "tiny.yaml", "train.tokens=512", "--name", "changed", "--auto-resume"]
    for keep in (2, 3, 2):
        assert lightlm(*command, f"checkpoint.keep_last={keep}").code == 0
        recipe = yaml.safe_load((workspace / "runs/changed/recipe.yaml").read_text())
        assert recipe["checkpoint"]["keep_last"] == keep


def test_auto_resume_of_a_complete_run_says_so_and_succeeds(lightlm, workspace):
    command = ["train", "tiny.yaml", "train.tokens=512", "name=finished", "--auto-resume"]
    lightlm(*command)
    before = (workspace / "runs/finished/metrics.jsonl").read_bytes()
    outcome = lightlm(*command)
    assert outcome.code == 0
    assert "runs/finished is complete; raise train.tokens" in outcome.stderr
    assert (workspace / "runs/finished/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", ["nothing", "temporary file", "recipe", "metrics"])
def test_auto_resume_of_a_run_killed_before_its_first_checkpoint_starts_in_its_folder(lightlm, workspace, left):
    name = f"early-{left.split()[0]}"
    command = ["train", "tiny.yaml", "train.tokens=512", "--name", name, "--auto-resume"]
    run = workspace / "runs" / name
    if left in ("recipe", "metrics"):
        lightlm(*command)
        shutil.rmtree(run / "checkpoints")
        if left == "recipe":
            (run / "metrics.jsonl").unlink()
    else:
        run.mkdir(parents=True)
        if left == "temporary file":
            (run / ".recipe.yaml.partial").write_text("name: tin")
    assert lightlm(*command).code == 0
    assert len(losses(run)) == 2
    assert not (workspace / "runs" / f"{name}-2").exists()


def test_auto_resume_does_not_write_into_a_folder_that_is_not_a_run(lightlm, workspace):
    (workspace / "runs/notes").mkdir(parents=True)
    (workspace / "runs/notes/todo.txt").write_text("mine")
    lightlm("train", "tiny.yaml", "--name", "notes", "--auto-resume").assert_one_message("runs/notes exists already")


def test_prompts_with_markup_are_printed_as_they_are(lightlm, workspace):
    outcome = lightlm("train", "tiny.yaml", "train.tokens=256", 'eval.prompts=["[/b] hi"]', "--name", "markup")
    assert outcome.code == 0
    assert "sample: [/b] hi" in outcome.stderr


def test_a_file_where_a_folder_should_be_is_one_message(lightlm, tmp_path, monkeypatch, workspace):
    (tmp_path / "runs").write_text("")
    (tmp_path / "data").symlink_to(workspace / "data")
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lightlm("train", "tiny.yaml").assert_one_message("runs")


def test_a_dataset_may_be_called_like_a_number(lightlm, workspace):
    lightlm("train", "tiny.yaml", "data.dataset=2024").assert_one_message("data/2024")


def test_a_missing_tracker_is_refused_before_anything_is_written(lightlm, monkeypatch, workspace):
    monkeypatch.setitem(sys.modules, "trackio", None)
    for extra in ([], ["--dry-run"]):
        outcome = lightlm("train", "tiny.yaml", "tracking.backends=[trackio]", "--name", "untracked", *extra)
        outcome.assert_one_message("trackio cannot be imported here", '--editable ".[tracking]"')
    assert not (workspace / "runs/untracked").exists()


def test_a_time_limit_shortens_a_new_run_and_says_so(lightlm, workspace, monkeypatch):
    from lightlm.train.planning import probe, time_limit

    slow = probe.Probe(2, pass_seconds=1.0, update_seconds=0.0, forward_seconds=0.0, memory=None, process_memory=None)
    monkeypatch.setattr(time_limit, "run_probe", lambda recipe: slow)
    command = ["train", "tiny.yaml", "train.tokens=1M", "--max-minutes", "1"]
    outcome = lightlm(*command, "--name", "limited")
    assert outcome.code == 0
    words = " ".join(outcome.stderr.split())
    assert re.search(
        r"the start took \d+ s of --max-minutes 1, and at 64 tokens/s the 1M tokens of this recipe take 4\.\d h more; "
        r"training on [23][.\d]*K instead",
        words,
    )
    hasty = lightlm("train", "tiny.yaml", "train.tokens=1M", "--max-minutes", "1e-3", "--dry-run")
    assert "instead, a single step; allow more minutes" in " ".join(hasty.stderr.split())
    small = ("schedule.batch_start=32", "schedule.batch_warmup=50%")  # several steps, as many tokens
    assert "a single step" not in lightlm("train", "tiny.yaml", *small, *command[2:4], "1e-3", "--dry-run").stderr
    tokens = yaml.safe_load((workspace / "runs" / "limited" / "recipe.yaml").read_text(encoding="utf-8"))["train"]
    steps = (workspace / "runs" / "limited" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(steps[-1])
    assert 2500 < tokens["tokens"] == last["tokens"] <= 3328  # 54 seconds, less what the start took
    assert last["lr"] < 0.5 * max(json.loads(step)["lr"] for step in steps)  # the schedule fits
    more = lightlm("train", "--resume", "limited", "train.tokens=3584")
    assert more.code == 0
    lightlm("train", "--resume", "limited", "--max-minutes", "1").assert_one_message("a resumed run keeps its tokens")
    lightlm("train", "tiny.yaml", "--max-minutes", "nan").assert_one_message("it must be a number above 0")
    lightlm(*command, "--nproc", "2").assert_one_message("--max-minutes times the steps of one process")


def test_a_time_limit_leaves_a_run_that_fits(lightlm, workspace, monkeypatch):
    from lightlm.train.planning import probe, time_limit

    fast = probe.Probe(2, pass_seconds=1e-6, update_seconds=0.0, forward_seconds=0.0, memory=None, process_memory=None)
    monkeypatch.setattr(time_limit, "run_probe", lambda recipe: fast)
    plan = json.loads(lightlm("train", "tiny.yaml", "--max-minutes", "4", "--dry-run", "--json").stdout)
    assert plan["tokens"] == json.loads(lightlm("train", "tiny.yaml", "--dry-run", "--json").stdout)["tokens"]
