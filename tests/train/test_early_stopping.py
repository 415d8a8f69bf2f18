"""`checkpoint.keep_best` and `train.patience` in runs whose validation losses are written here."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.cli.displays.run import print_result
from lightlm.convert.load import load_pretrained, locate
from lightlm.data.prepare.run import prepare
from lightlm.errors import RecipeError
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.runs.listing import summarize
from lightlm.train.observe.metrics import read_metrics
from lightlm.train.trainer import Trainer
from tests.corpus import write_jsonl
from tests.train.group import together, train_together
from tests.train.watch import Recorder, comparable, make_trainer, resume, start

# By step; the best is 2.0 at step 4, and step 7 is the third validation since.
LOSSES = [None, 3.0, 2.5, 2.7, 2.0, 2.0, 2.4, 2.1, 1.5, 1.9, 1.8]
RUN = ("train.tokens=2560", "eval.every=256", "eval.prompts=[]", "checkpoint.every=1280", "checkpoint.keep_last=1")
BEST = (*RUN, "checkpoint.keep_best=true")
PATIENT = (*BEST, "train.patience=3")


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(Trainer, "_evaluate_weights", scripted)


evaluate_weights = Trainer._evaluate_weights


def scripted(trainer, stop):
    loss = LOSSES[trainer.progress.step]
    trainer.evaluations.losses = lambda *_: {"val_loss": loss, "val_bpb": loss}
    return evaluate_weights(trainer, stop)


def saved(run):
    return [int(path.name[5:]) for path in checkpoint.checkpoints(RUNS / run)]


def best(run):
    found = checkpoint.best_checkpoint(RUNS / run)
    return found and int(found.name[5:])


def test_the_best_step_is_kept_beside_the_newest():
    result, watch = start("tiny.yaml", *BEST, name="best")
    assert (saved("best"), best("best")) == ([8, 10], 8)
    assert watch.saved == [f"step_{step:06d}" for step in (1, 2, 4, 5, 8, 10)]
    assert (result.best_step, result.best_val_loss, result.stopped_early) == (8, 1.5, False)
    assert locate("runs/best").name == "step_000010"
    assert locate("runs/best/checkpoints/best").resolve().name == "step_000008"
    assert load_pretrained("runs/best/checkpoints/best").path.resolve().name == "step_000008"
    pointer = RUNS / "best/checkpoints/best"
    pointer.unlink()
    pointer.write_text("step_000008")  # where the system allows no links
    assert locate("runs/best/checkpoints/best").name == "step_000008"
    checkpoint.check(checkpoint.best_checkpoint(RUNS / "best"))


def test_patience_ends_a_run_which_is_then_complete():
    result, watch = start("tiny.yaml", *PATIENT, name="patient")
    assert (result.step, result.stopped_early, result.interrupted, result.best_step) == (7, True, False, 4)
    assert (saved("patient"), best("patient")) == ([4, 7], 4)
    assert [m.get("stopped_early", False) for m in watch.metrics] == [False] * 6 + [True]
    assert summarize(RUNS / "patient").state == "complete"
    again, watched = resume("patient")
    assert (again.step, again.stopped_early, again.best_step, watched.metrics) == (7, True, 4, [])
    assert "raise train.patience, or set it to null" in watched.notes[-1]
    further, watched = resume("patient", "train.patience=null")
    assert (further.step, further.stopped_early, further.best_step) == (10, False, 8)
    assert (saved("patient"), best("patient")) == ([8, 10], 8)
    whole = start("tiny.yaml", *BEST, name="patience-whole")[1].metrics
    assert [m["loss"] for m in read_metrics(RUNS / "patient")] == [m["loss"] for m in whole]


def test_patience_needs_no_best_checkpoint_and_more_of_it_reaches_the_end():
    result, _ = start("tiny.yaml", *RUN, "train.patience=3", name="no-best")
    assert (result.step, saved("no-best"), best("no-best")) == (7, [7], None)
    assert not start("tiny.yaml", *RUN, "train.patience=4", name="more-patient")[0].stopped_early


def test_an_early_end_is_scored_like_any_end():
    scored = []
    recipe = load_recipe("tiny.yaml", [*PATIENT, "eval.tasks=[heldout]"])

    def evaluator(model, path, stop, finished):
        scored.append(path.name)
        return {}

    trainer = make_trainer(recipe, "scored", Recorder(), evaluator=evaluator)
    trainer.train()
    assert scored == ["step_000007"]


@pytest.mark.parametrize("stop_at", [1, 4, 6, 7])
def test_resuming_repeats_best_and_end(stop_at):
    _, whole = start("tiny.yaml", *PATIENT, name=f"whole-{stop_at}")
    stopped = Recorder(terminate_at=stop_at)
    name = f"stopped-early-{stop_at}"
    start("tiny.yaml", *PATIENT, name=name, watch=stopped)
    result, rest = resume(name)
    assert (result.step, result.stopped_early, result.best_step) == (7, True, 4)
    assert comparable(stopped.metrics + rest.metrics) == comparable(whole.metrics)
    assert (saved(name), best(name)) == ([4, 7], 4)
    first, second = (load_file(RUNS / run / "checkpoints/best/model.safetensors") for run in (name, f"whole-{stop_at}"))
    assert all(torch.equal(first[key], second[key]) for key in second)


class Kill(BaseException):
    """Ends a run as SIGKILL would, but leaves this process."""


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_kill_between_a_best_checkpoint_and_its_pointer(kill_at, monkeypatch):
    plain, calls = checkpoint.mark_best, []

    def mark_best(path):
        calls.append(path)
        if len(calls) == kill_at:
            raise Kill
        plain(path)

    monkeypatch.setattr(checkpoint, "mark_best", mark_best)
    name = f"unmarked-{kill_at}"
    with pytest.raises(Kill):
        start("tiny.yaml", *PATIENT, name=name)
    result, _ = resume(name)
    assert (result.step, result.best_step, saved(name), best(name)) == (7, 4, [4, 7], 4)


def test_a_damaged_best_checkpoint_is_found_again():
    start("tiny.yaml", *BEST, "checkpoint.keep_last=2", name="damaged-best", watch=Recorder(terminate_at=8))
    shutil.copytree(RUNS / "damaged-best", RUNS / "damaged-best-2", symlinks=True)
    newest = RUNS / "damaged-best-2/checkpoints/step_000008/model.safetensors"
    newest.write_bytes(b"?" + newest.read_bytes()[1:])
    result, watch = resume("damaged-best-2")
    assert any("step_000008.damaged" in note for note in watch.notes)
    assert (result.best_step, best("damaged-best-2")) == (8, 8)
    checkpoint.check(checkpoint.best_checkpoint(RUNS / "damaged-best-2"))


def train_scripted(world, *arguments):
    Trainer._evaluate_weights = scripted
    return train_together(world, *arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_end_together(parallel):
    name = f"patient-{parallel}"
    before = together(2, train_scripted, name, (*PATIENT, f"train.parallel={parallel}"), 5)
    after = together(2, train_scripted, name, (), None, 0, True)
    steps = [m["step"] for m in before[0][0] + after[0][0]]
    assert steps == list(range(1, 8))
    assert [interrupted for _, _, interrupted in after] == [False, False]
    assert (saved(name), best(name)) == ([4, 7], 4)


def test_the_end_names_the_best_checkpoint(capsys):
    recipe = load_recipe("tiny.yaml", PATIENT)
    trainer = make_trainer(recipe, "printed", Recorder())
    result = trainer.train()
    print_result(result, trainer, None, as_json=False)
    printed = capsys.readouterr().out
    assert "Stopped early: 3 validations without a new best (train.patience)" in printed
    assert "Best validation loss 2.0000 at step 4: runs/printed/checkpoints/best" in printed
    print_result(result, trainer, None, as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert (values["stopped_early"], values["best_step"], values["best_val_loss"]) == (True, 4, 2.0)


@pytest.mark.parametrize("override", ["train.patience=2", "checkpoint.keep_best=true"])
def test_they_are_refused_without_validations_to_compare(override, tmp_path):
    key = override.partition("=")[0]
    with pytest.raises(RecipeError, match=f"{key}: has no effect without eval.every"):
        load_recipe("tiny.yaml", [override, "eval.every=0"])
    prepare(str(write_jsonl(tmp_path / "all.jsonl", 50)), "train:320", tmp_path / "no-val", val_fraction=0)
    recipe = load_recipe("tiny.yaml", [override, f"data.dataset={tmp_path / 'no-val'}"])
    with pytest.raises(RecipeError, match=f"{key} need.* validation"):
        make_trainer(recipe, f"no-val-{os.getpid()}", Recorder())


@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_patience_is_a_number_of_validations(value):
    with pytest.raises(RecipeError, match=r"train\.patience"):
        load_recipe("tiny.yaml", [f"train.patience={value}"])
