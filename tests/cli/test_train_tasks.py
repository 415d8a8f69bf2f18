"""lm-eval's tasks during training, by the task heldout, which needs no network."""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch

from lightlm.recipe import load_recipe
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.observe.metrics import MEASURED, read_metrics
from lightlm.train.rng import preserved
from tests.corpus import make_workspace
from tests.evaluate.tiny_run import write_quiz
from tests.shapes import build
from tests.train.watch import Recorder, make_trainer

SHORT = ["train.tokens=2560", "eval.prompts=[The old]"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("train-tasks"), 100)


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def training(run):
    return [
        {key: value for key, value in m.items() if key not in MEASURED and not key.startswith("eval/")}
        for m in read_metrics(run)
    ]


def test_scores_are_those_of_lightlm_eval_and_training_does_not_notice(lightlm, workspace):
    tasks = ["eval.tasks=[heldout]", "eval.tasks_every=1024", "eval.limit=3"]
    outcome = lightlm("train", "tiny.yaml", *SHORT, *tasks, "--name", "scored")
    assert outcome.code == 0, outcome
    assert lightlm("train", "tiny.yaml", *SHORT, "--name", "plain").code == 0
    scored, plain = workspace / "runs/scored", workspace / "runs/plain"
    assert training(scored) == training(plain)
    for file in ("model.safetensors", "training_state.pt"):
        ours, other = (run / "checkpoints/step_000010" / file for run in (scored, plain))
        if file == "model.safetensors":
            assert ours.read_bytes() == other.read_bytes()
        else:
            states = [torch.load(path, weights_only=True)["rng"] for path in (ours, other)]
            assert torch.equal(*states)
    scores = {
        m["step"]: m["eval/heldout/bits_per_byte"] for m in read_metrics(scored) if "eval/heldout/bits_per_byte" in m
    }
    assert list(scores) == [4, 8, 10]
    assert scores[10] < scores[4]
    assert "step     10  heldout/byte_perplexity" in outcome.stderr
    report = json.loads(
        lightlm("eval", str(scored), "--tasks", "heldout", "--limit", "3", "--dtype", "float32", "--json").stdout
    )
    figures = {row["metric"]: row["value"] for row in report["models"][0]["results"]}
    assert figures["bits_per_byte"] == scores[10]


def test_an_unknown_task_is_refused_before_anything_is_written(lightlm, workspace):
    outcome = lightlm("train", "tiny.yaml", "eval.tasks=[heldou]", "--name", "typo")
    outcome.assert_one_message("lm-eval has no task 'heldou'", "heldout")
    assert not (workspace / "runs/typo").exists()


def test_a_multiple_choice_task_is_scored_and_refused_where_its_data_are_gone(lightlm, workspace):
    quiz = write_quiz(workspace)
    assert lightlm("train", "tiny.yaml", "train.tokens=256", f"eval.tasks=[{quiz}]", "--name", "quiz").code == 0
    [metrics] = read_metrics(workspace / "runs/quiz")
    assert metrics["eval/quiz/acc"] * 6 == pytest.approx(round(metrics["eval/quiz/acc"] * 6))
    assert 0 <= metrics["eval/quiz/acc_norm"] <= 1
    (workspace / "quiz.jsonl").unlink()
    shutil.rmtree(workspace / "cache")
    outcome = lightlm("train", "tiny.yaml", f"eval.tasks=[{quiz}]", "--name", "no-quiz")
    outcome.assert_one_message("quiz")
    assert not (workspace / "runs/no-quiz").exists()


def test_a_task_that_fails_later_is_noted_and_training_goes_on():
    calls = []

    def evaluator(model, path, stop, finished):
        calls.append(path.name)
        if len(calls) == 1:
            raise OSError("the Hub gave no answer")
        return {"quiz/acc": 0.5}

    watch = Recorder()
    recipe = load_recipe("tiny.yaml", [*SHORT, "eval.tasks=[quiz]", "eval.tasks_every=1280"])
    trainer = make_trainer(recipe, "failing", watch, evaluator=evaluator)
    assert trainer.train().step == 10
    assert calls == ["step_000005", "step_000010"]
    assert watch.notes == ["eval.tasks could not be scored at step 5: the Hub gave no answer"]
    assert [m["step"] for m in watch.metrics if "eval/quiz/acc" in m] == [10]


def test_a_signal_breaks_an_evaluation_off_and_the_run_is_saved():
    def evaluator(model, path, stop, finished):
        os.kill(os.getpid(), signal.SIGTERM)
        return None if stop.wait(10) else {}

    watch = Recorder()
    recipe = load_recipe("tiny.yaml", [*SHORT, "eval.tasks=[quiz]", "eval.tasks_every=1280"])
    trainer = make_trainer(recipe, "broken-off", watch, evaluator=evaluator)
    result = trainer.train()
    assert (result.interrupted, result.step) == (True, 5)
    assert watch.saved == ["step_000005"]
    assert [m["step"] for m in watch.metrics] == [1, 2, 3, 4]
    recipe, run, saved = reopen_run("broken-off", [])
    trainer = make_trainer(recipe, run, watch, checkpoint=saved, evaluator=lambda *_: {"quiz/acc": 0.5})
    assert not trainer.train().interrupted
    assert [m["step"] for m in watch.metrics if "eval/quiz/acc" in m] == [5, 10]


def test_a_folder_of_data_sets_that_is_not_there_is_named(lightlm, workspace):
    changes = ["eval.tasks=[quiz.yaml]", "eval.data_dir=evals"]
    write_quiz(workspace)
    outcome = lightlm("train", "tiny.yaml", *changes, "--name", "no-sets")
    outcome.assert_one_message("evals is not a folder", "eval.data_dir", "--data-dir evals` makes it")


def test_an_evaluation_leaves_no_trace():
    model = build("llama").train()

    def draws():
        return random.random(), np.random.random(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with preserved(model):
        model.eval()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
    assert model.training
    assert draws() == expected
