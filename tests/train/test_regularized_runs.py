"""Dropout and z-loss in runs: masks and metrics must not depend on micro-batches, processes or interruptions."""

import sys

import pytest
import torch

from tests.train.group import together, train_together
from tests.train.test_distributed import assert_close, small_memory
from tests.train.watch import Recorder, comparable, resume, start

BOTH = ("train.tokens=1280", "eval.every=640", "eval.prompts=[]", "train.dropout=0.2", "train.z_loss=0.01")


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def metrics(workspace):
    """What one process logged, uninterrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return start("tiny.yaml", *BOTH, name="regularized")[1].metrics


def test_the_losses_shown_are_plain_and_the_z_loss_beside_them(metrics):
    _, plain = start("tiny.yaml", *BOTH[:3], name="unregularized")
    assert "z_loss" not in plain.metrics[0]
    assert metrics[0]["loss"] != plain.metrics[0]["loss"]
    assert metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=0.02)  # not raised by 0.01 x 33
    assert metrics[0]["z_loss"] == pytest.approx(5.77**2, rel=0.02)  # ln(320)^2


def test_validation_drops_nothing():
    """At a rate so low that the weights stay as they begin."""
    frozen = ("tiny.yaml", "train.tokens=512", "eval.every=512", "eval.prompts=[]", "optimizer.lr=1e-30")
    plain, dropped = (
        start(*frozen, name="validated")[1],
        start(*frozen, "train.dropout=0.9", name="validated-dropped")[1],
    )
    assert plain.metrics[-1]["loss"] != dropped.metrics[-1]["loss"]
    assert plain.metrics[-1]["val_loss"] == dropped.metrics[-1]["val_loss"]


def test_resuming_repeats_the_masks(metrics):
    stopped = Recorder(terminate_at=2)
    start("tiny.yaml", *BOTH, name="regularized-stopped", watch=stopped)
    torch.manual_seed(99)
    _, rest = resume("regularized-stopped")
    assert comparable(stopped.metrics + rest.metrics) == comparable(metrics)


@pytest.mark.parametrize("override", ["train.micro_batch_size=8", "train.activation_checkpointing=true"])
def test_masks_do_not_depend_on_how_a_batch_is_computed(override, metrics):
    _, other = start("tiny.yaml", *BOTH, override, name=f"regularized-{override.partition('=')[0][6:]}")
    assert_close(other.metrics, metrics)
    assert [m["z_loss"] for m in other.metrics] == pytest.approx([m["z_loss"] for m in metrics], rel=1e-5)


def test_a_micro_batch_halved_for_memory_drops_the_same(metrics, monkeypatch):
    small_memory(monkeypatch, 3)
    _, other = start("tiny.yaml", *BOTH, "train.micro_batch_size=auto", name="regularized-halved")
    assert any("does not fit" in note for note in other.notes)
    assert_close(other.metrics, metrics)


def test_batches_repeated_in_float16_drop_the_same(monkeypatch):
    half = (*BOTH, "train.dtype=float16")
    _, plain = start("tiny.yaml", *half, name="regularized-half")
    monkeypatch.setattr("lightlm.train.step.scaling._FIRST", 2.0**28)
    _, retried = start("tiny.yaml", *half, name="regularized-retried")
    assert retried.metrics[-1]["overflows"] > plain.metrics[-1]["overflows"]
    assert retried.metrics[0]["loss"] == plain.metrics[0]["loss"]
    losses = [m["loss"] for m in plain.metrics]  # other scales round other small gradients
    assert [m["loss"] for m in retried.metrics] == pytest.approx(losses, rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_drop_the_same(parallel, metrics):
    seen = together(2, train_together, f"regularized-{parallel}", (*BOTH, f"train.parallel={parallel}"))[0][0]
    assert_close(seen, metrics)
    assert [m["z_loss"] for m in seen] == pytest.approx([m["z_loss"] for m in metrics], rel=1e-5)
