"""A mixture of experts on two processes: one load, one bias, and one model, however it is shared out."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.runs import RUNS
from tests.train.group import together, train_together
from tests.train.step.routed import SHORT, SIGMOID, SOFTMAX, biases, expected_biases, loads, routed_run
from tests.train.watch import comparable, resume, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds and forks processes the Linux way")

FOUR = ("train.micro_batch_size=1", SHORT)  # micro-batches in each of two processes
BRIEF = ("train.tokens=768",)  # 3 steps, of two micro-batches in each


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def weights(name):
    return load_file(checkpoint.newest_checkpoint(RUNS / name) / "model.safetensors")


def routed_member(world, name, overrides, edit=None):
    """(metrics, steps) of one process."""
    metrics, steps, _ = routed_run(name, *overrides, world=world, edit=edit)
    return metrics, steps


def assert_close(first, second, loss=1e-6, norm=1e-4):
    assert [m["step"] for m in first] == [m["step"] for m in second]
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=loss)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=norm)
        assert a.get("val_loss", 0.0) == pytest.approx(b.get("val_loss", 0.0), rel=1e-6)


@pytest.fixture(scope="module")
def single(workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return routed_run("experts-single", *SIGMOID, *FOUR)


@pytest.mark.parametrize(("strategy", "recompute"), [("ddp", False), ("ddp", True), ("fsdp", True)])
def test_two_processes_move_the_bias_of_one(single, strategy, recompute):
    """By the formula from both processes' loads, and once a step; five experts on two processes are uneven shards."""
    name = f"experts-{strategy}-{recompute}"
    parallel = f"train.parallel={strategy}", f"train.activation_checkpointing={str(recompute).lower()}"
    (metrics, first), (_, second) = together(2, routed_member, name, (*SIGMOID, *FOUR, *parallel))
    counted = loads(first) + loads(second)
    assert (counted.sum(-1) == 2 * 256).all()
    assert not np.array_equal(loads(first), loads(second))
    assert np.array_equal(biases(first), expected_biases(counted, 0.01))
    assert np.array_equal(biases(first), biases(second))
    assert np.array_equal(biases(first), biases(single[1]))
    assert_close(metrics, single[0])
    saved = weights(name)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert np.array_equal(saved["blocks.2.mlp.router.selection_bias"].numpy(), biases(first)[-1, 1])


def avoid_last(trainer):
    """No token chooses expert 4."""
    for block in trainer.model.blocks[1:]:
        block.mlp.router.selection_bias[4] = -100.0


def test_an_expert_without_tokens_breaks_nothing():
    """The others learn as in one process; its own weights stay, for its gradient is zero."""
    kept = (*SIGMOID, *BRIEF, "moe.bias_update_rate=0", "optimizer.weight_decay=0")
    before = []

    def edit(trainer):
        avoid_last(trainer)
        before.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})

    alone, _, _ = routed_run("avoided-single", *kept, edit=edit)
    (metrics, first), (_, second) = together(2, routed_member, "avoided", kept, avoid_last)
    assert not (loads(first) + loads(second))[..., 4].any()
    assert_close(metrics, alone)
    after = weights("avoided")
    for part in ("gate_proj", "up_proj", "down_proj"):
        key = f"blocks.1.mlp.experts.{part}"
        assert torch.equal(after[key][4], before[0][key][4])
        assert not torch.equal(after[key][0], before[0][key][0])


@pytest.mark.parametrize(("strategy", "optimizer"), [("ddp", "adamw"), ("fsdp", "muon")])
def test_softmax_routers_and_muon(strategy, optimizer):
    """The softmax balance loss is that of a forward pass: with the same micro-batches it does not see processes."""
    overrides = (*SOFTMAX, *BRIEF, f"optimizer.name={optimizer}", "moe.z_loss_coef=0.1")
    _, watch = start("tiny.yaml", *overrides, name=f"soft-{optimizer}")
    parallel = (*overrides, f"train.parallel={strategy}")
    metrics = together(2, train_together, f"soft-{optimizer}-{strategy}", parallel)[0][0]
    assert_close(metrics, watch.metrics, loss=1e-5 if optimizer == "muon" else 1e-6, norm=1e-3)


def router_dtypes(world, name, overrides):
    """Losses, and the types of every router's weight, bias, and results in a sharded run."""
    caught = set()

    def remember(router, inputs, output):
        caught.add((router.weight.dtype, router.selection_bias.dtype, *(part.dtype for part in output[1:])))

    def edit(trainer):
        for block in trainer.model.blocks[1:]:
            block.mlp.router.register_forward_hook(remember)

    return routed_run(name, *overrides, world=world, edit=edit)[0], caught


def test_mixed_precision_keeps_sharded_routers_in_fp32():
    low = (*SIGMOID, *BRIEF, "train.dtype=bfloat16")
    _, watch = start("tiny.yaml", *low, name="experts-low-single")
    (metrics, dtypes), (_, others) = together(2, router_dtypes, "experts-low", (*low, "train.parallel=fsdp"))
    assert dtypes == others == {(torch.float32,) * 5}
    for a, b in zip(metrics, watch.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_checkpoints_move_between_one_process_copies_and_shards():
    """With their biases: a run is cut after steps 2 and 4, and resumes in another way each time."""
    six = (*SIGMOID, "train.tokens=1536", "checkpoint.every=256", "checkpoint.keep_last=20")
    _, watch = start("tiny.yaml", *six, name="moving-whole")
    sharded = together(2, train_together, "moving", (*six, "train.parallel=fsdp"), 2)[0][0]
    copies = together(2, train_together, "moving", ("train.parallel=ddp",), 4, 0, True)[0][0]
    _, single = resume("moving")
    for part in (sharded, copies, single.metrics):
        assert part
    assert_close(sharded + copies + single.metrics, watch.metrics)
    for step in range(1, 7):
        path = f"checkpoints/{checkpoint.step_name(step)}/model.safetensors"
        ours, theirs = (load_file(RUNS / run / path) for run in ("moving", "moving-whole"))
        for key in theirs:
            if key.endswith("selection_bias"):
                assert theirs[key].any()
                assert torch.equal(ours[key], theirs[key])


def test_a_stopped_sharded_run_goes_on_bit_for_bit():
    brief = (*SIGMOID, "train.tokens=1024", "train.parallel=fsdp", "optimizer.name=muon")
    whole = together(2, train_together, "sharded-whole", brief)[0][0]
    before = together(2, train_together, "sharded-cut", brief, 2)[0][0]
    after = together(2, train_together, "sharded-cut", (), None, 0, True)[0][0]
    assert before
    assert comparable(before + after) == comparable(whole)
    ours, theirs = weights("sharded-cut"), weights("sharded-whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
