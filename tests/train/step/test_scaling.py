import math

import pytest
import torch
from torch import nn

from lightlm.train.step.scaling import LossScale, ScaleState
from tests.train.watch import Recorder, comparable, resume, start

HALF = ("tiny.yaml", "train.dtype=float16", "train.tokens=1280", "eval.every=0", "checkpoint.every=512")


def test_overflows_halve_the_scale_and_good_batches_double_it(monkeypatch):
    monkeypatch.setattr("lightlm.train.step.scaling._GROWS_AFTER", 3)
    scale = LossScale(torch.float16)
    assert scale.state.scale == 2**16
    assert not scale.accept(finite=False)
    assert scale.state == ScaleState(2**15, 0, 1)
    assert all(scale.accept(finite=True) for _ in range(3))
    assert scale.state == ScaleState(2**16, 0, 1)
    lowest = LossScale(torch.float16, ScaleState(1.0, 5, 9))
    assert lowest.accept(finite=False)  # the model's own NaN, which ends the run
    other = LossScale(torch.bfloat16, scale.state)
    assert other.accept(finite=False)
    assert other.state == scale.state


def test_a_scaled_gradient_is_the_plain_one():
    weight = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    scale = LossScale(torch.float16)
    (plain,) = torch.autograd.grad((weight**2).sum(), weight)
    scale((weight**2).sum()).backward()
    assert weight.grad.norm() == pytest.approx(float(plain.norm()) * 2**16)
    scale.unscale([weight])
    assert torch.equal(weight.grad, plain)


@pytest.fixture
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.mark.usefixtures("_in_workspace")
def test_a_run_in_float16_learns_retries_and_resumes_exactly(monkeypatch):
    """The first scale is far too large; batches are repeated until it fits, and nothing of the run depends on it."""
    monkeypatch.setattr("lightlm.train.step.scaling._FIRST", 2.0**26)
    _, watch = start(*HALF, name="half")
    losses = [metrics["loss"] for metrics in watch.metrics]
    assert losses[0] == pytest.approx(math.log(320), rel=0.03)
    assert losses[-1] < losses[0]
    last = watch.metrics[-1]
    assert last["overflows"] > 0
    assert last["loss_scale"] == 2.0 ** (26 - last["overflows"])
    stopped = Recorder(terminate_at=3)
    start(*HALF, name="half-stopped", watch=stopped)
    _, rest = resume("half-stopped")
    assert comparable(stopped.metrics[:3] + rest.metrics) == comparable(watch.metrics)
    _, fp32 = start(*HALF, "train.dtype=float32", name="full")
    assert losses == pytest.approx([metrics["loss"] for metrics in fp32.metrics], rel=2e-3)
    assert "loss_scale" not in fp32.metrics[-1]
