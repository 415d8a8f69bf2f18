"""Runs with `train.ema`: what they validate, save and resume."""

import json
import shutil
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from lightlm import checkpoint, files
from lightlm.convert.load import load_pretrained
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.train.observe.metrics import read_metrics
from tests.train.group import together, train_together
from tests.train.step.test_averaging import shares
from tests.train.watch import Recorder, comparable, make_trainer, resume, start

# 10 steps of 256 tokens, a validation after 5 and 10; half-life two steps.
SHORT = ("train.tokens=2560", "eval.every=1280")
EMA = (*SHORT, "train.ema=20%")


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def averaged(workspace):
    """An uninterrupted run: its result, what was seen, and the weights after each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        weights = []

        class Watch(Recorder):
            def step(self, metrics):
                super().step(metrics)
                weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})

        watch = Watch()
        trainer = make_trainer(load_recipe("tiny.yaml", EMA), "averaged", watch, lambda *_: "...")
        return trainer.train(), watch, weights


def saved(run, name=checkpoint.MODEL_WEIGHTS):
    return load_file(checkpoint.newest_checkpoint(RUNS / run) / name)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_checkpoints_hold_the_average_and_the_last_weights(averaged):
    _, _, weights = averaged
    assert same(saved("averaged", checkpoint.RAW_WEIGHTS), weights[-1])
    sizes = shares([256] * 10, 512)
    for name, tensor in saved("averaged").items():
        expected = sum(size * step[name].double() for size, step in zip(sizes, weights, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def test_training_is_not_changed_and_validation_is_of_the_average(averaged):
    result, watch, _ = averaged
    _, plain = start("tiny.yaml", *SHORT, name="not-averaged")
    assert [m["loss"] for m in watch.metrics] == [m["loss"] for m in plain.metrics]
    for ours, theirs in zip(watch.metrics, plain.metrics, strict=True):
        assert ours.get("val_loss_raw") == theirs.get("val_loss")
        assert ours.get("val_loss") != theirs.get("val_loss") or "val_loss" not in ours
    assert result.val_loss == watch.metrics[-1]["val_loss"]
    assert not (RUNS / "not-averaged/checkpoints/latest/raw.safetensors").exists()
    # A run that only validates the exported weights finds the same loss.
    trainer = make_trainer(load_recipe("tiny.yaml", SHORT), "revalidated", Recorder())
    trainer.model.load_state_dict(saved("averaged"))
    assert trainer.evaluations.losses(threading.Event())["val_loss"] == result.val_loss


def test_samples_and_tasks_see_the_average():
    seen = []

    def sampler(model, prompt):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return "..."

    def evaluator(model, path, stop, finished):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {}

    recipe = load_recipe("tiny.yaml", (*EMA, "eval.every=0", "eval.tasks=[heldout]"))
    make_trainer(recipe, "watched", Recorder(), sampler, evaluator=evaluator).train()
    assert len(seen) == 2
    assert all(same(weights, saved("watched")) for weights in seen)


@pytest.mark.parametrize("stop_at", [1, 7])
def test_resuming_repeats_the_average_bit_for_bit(averaged, stop_at):
    _, watch, _ = averaged
    stopped = Recorder(terminate_at=stop_at)
    name = f"averaged-{stop_at}"
    start("tiny.yaml", *EMA, name=name, watch=stopped)
    resumed, rest = resume(name)
    assert comparable(stopped.metrics + rest.metrics) == comparable(watch.metrics)
    assert comparable(read_metrics(resumed.run)) == comparable(watch.metrics)
    for file in (checkpoint.MODEL_WEIGHTS, checkpoint.RAW_WEIGHTS):
        assert same(saved(name, file), saved("averaged", file))


class Kill(BaseException):
    """Ends a run as SIGKILL would, but leaves this process."""


def test_a_run_killed_while_the_average_is_in_place_resumes_from_the_last_weights(averaged):
    def sampler(model, prompt):
        if trainer.progress.step == 10:
            raise Kill
        return "..."

    trainer = make_trainer(load_recipe("tiny.yaml", EMA), "averaged-killed", Recorder(), sampler)
    with pytest.raises(Kill):
        trainer.train()
    result, _ = resume("averaged-killed")
    assert comparable(read_metrics(result.run)) == comparable(averaged[1].metrics)
    for file in (checkpoint.MODEL_WEIGHTS, checkpoint.RAW_WEIGHTS):
        assert same(saved("averaged-killed", file), saved("averaged", file))


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_average_the_same(parallel, averaged):
    name, plain = f"averaged-{parallel}", f"not-averaged-{parallel}"
    unaveraged = together(2, train_together, plain, (*SHORT, f"train.parallel={parallel}"))[0][0]
    before = together(2, train_together, name, (*EMA, f"train.parallel={parallel}"), 7)[0][0]
    after = together(2, train_together, name, (), None, 0, True)[0][0]
    for ours, theirs in zip(before + after, averaged[1].metrics, strict=True):
        for key in ("loss", "val_loss", "val_loss_raw"):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), abs=2e-5)
    # Also the passes right after a validation of the average, from which FSDP keeps gathered weights.
    assert [m["loss"] for m in before + after] == [m["loss"] for m in unaveraged]
    assert same(saved(name, checkpoint.RAW_WEIGHTS), saved(plain))
    for file in (checkpoint.MODEL_WEIGHTS, checkpoint.RAW_WEIGHTS):
        ours, theirs = saved(name, file), saved("averaged", file)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_routers_biases_are_averaged_too():
    experts = ("model.num_experts=4", "model.num_experts_per_tok=2", "model.moe_intermediate_size=16")
    overrides = (*experts, "train.tokens=1280", "eval.every=0", "eval.prompts=[]", "moe.bias_update_rate=0.1")
    start("tiny.yaml", *overrides, "train.ema=50%", name="averaged-experts")
    average, raw = saved("averaged-experts"), saved("averaged-experts", checkpoint.RAW_WEIGHTS)
    names = [name for name in average if name.endswith("selection_bias")]
    assert names
    assert not any(torch.equal(average[name], raw[name]) for name in names)


def test_an_average_begins_and_ends_when_a_resumed_run_asks_for_it(averaged):
    """A new average begins there; without one, training goes on from the last weights."""
    _, _, weights = averaged
    start("tiny.yaml", *SHORT, name="late", watch=Recorder(terminate_at=6))
    resume("late", "train.ema=512")
    sizes = shares([256] * 4, 512)
    for name, tensor in saved("late").items():
        expected = sum(size * step[name].double() for size, step in zip(sizes, weights[6:], strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    start("tiny.yaml", *EMA, name="averaged-early", watch=Recorder(terminate_at=6))
    _, rest = resume("averaged-early", "train.ema=0%")
    assert same(saved("averaged-early"), weights[-1])
    assert not checkpoint.has_average(checkpoint.newest_checkpoint(RUNS / "averaged-early"))
    assert "val_loss_raw" not in rest.metrics[-1]


def test_a_checkpoint_with_damaged_last_weights_is_not_resumed(averaged):
    shutil.copytree("runs/averaged", "runs/averaged-damaged", symlinks=True)
    newest = checkpoint.newest_checkpoint(RUNS / "averaged-damaged")
    file = newest / checkpoint.RAW_WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    result, watch = resume("averaged-damaged")
    assert "raw.safetensors is damaged" in watch.notes[0]
    assert comparable(read_metrics(result.run)) == comparable(averaged[1].metrics)
    assert same(saved("averaged-damaged"), saved("averaged"))


def test_either_set_of_weights_can_be_loaded(averaged):
    for choice, file in ((None, "model"), ("ema", "model"), ("raw", "raw")):
        loaded = load_pretrained("averaged", weights=choice)
        assert same(loaded.model.state_dict(), saved("averaged", f"{file}.safetensors"))
        assert loaded.weights[0].name == f"{file}.safetensors"


def test_checkpoints_from_before_averages_still_resume(averaged):
    """Their training state does not know of averages."""
    start("tiny.yaml", *SHORT, name="old", watch=Recorder(terminate_at=6))
    folder = checkpoint.newest_checkpoint(RUNS / "old")
    state = torch.load(folder / checkpoint.TRAINING_STATE, weights_only=True)
    del state["progress"]["averaged_from"], state["recipe"]["train"]["ema"]
    torch.save(state, folder / checkpoint.TRAINING_STATE)
    marker = json.loads((folder / "complete.json").read_text())
    path = folder / checkpoint.TRAINING_STATE
    marker["files"][path.name] = {"bytes": path.stat().st_size, "xxh3": files.checksum(path)}
    (folder / "complete.json").write_text(json.dumps(marker))
    _, watch = resume("old")
    assert [m["loss"] for m in watch.metrics] == [m["loss"] for m in averaged[1].metrics[6:]]
