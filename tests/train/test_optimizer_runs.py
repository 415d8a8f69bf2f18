"""Whole runs with Muon, cautious decay and a growing batch."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.errors import RecipeError
from lightlm.recipe import load_recipe
from lightlm.train.observe.metrics import read_metrics
from tests.train.watch import Recorder, comparable, make_trainer, resume, start

OVERRIDES = {
    "muon": ["optimizer.name=muon", "optimizer.lr=3e-2", "optimizer.embedding_lr=1e-2"],
    "muon-bf16": ["optimizer.name=muon", "optimizer.lr=3e-2", "train.dtype=bfloat16"],
    "scaled": [
        "optimizer.name=muon",
        "optimizer.lr=3e-2",
        "optimizer.multiplier_weight_decay=0.1",
        "model.multipliers=both",
        "model.residual_scale=0.5",
        "model.base_depth=1",
        "model.embedding_scale=3",
    ],
    "cautious": ["optimizer.cautious=true", "optimizer.weight_decay=1"],
    "growing": ["optimizer.name=muon", "schedule.batch_warmup=60%", "schedule.batch_start=64"],
}


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def weights(run):
    return load_file(checkpoint.newest_checkpoint(run) / "model.safetensors")


@pytest.fixture(scope="module")
def runs(workspace):
    """An uninterrupted run of each kind, made when it is first asked for."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = start("tiny.yaml", *OVERRIDES[name], name=f"whole-{name}")
        return made[name]

    return run


@pytest.mark.parametrize("name", OVERRIDES)
def test_interrupted_runs_go_on_bit_for_bit(runs, name):
    whole, _ = runs(name)
    before, _ = start("tiny.yaml", *OVERRIDES[name], name=f"stopped-{name}", watch=Recorder(terminate_at=11))
    assert before.step == 11
    after, _ = resume(f"stopped-{name}")
    assert comparable(read_metrics(after.run)) == comparable(read_metrics(whole.run))
    expected, found = weights(whole.run), weights(after.run)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_muon_learns_the_tiny_corpus_and_its_rates_are_logged(runs):
    """20 steps of 256 tokens of a corpus whose unigrams have 4.1 nats; AdamW at 1e-2 gets to 3.2."""
    result, watch = runs("muon")
    assert result.val_loss < 2.8
    assert max(m["lr"] for m in watch.metrics) == 3e-2
    assert max(m["lr_embedding"] for m in watch.metrics) == 1e-2
    assert "lr_scalar" not in watch.metrics[0]


def test_a_growing_batch_keeps_the_count_of_tokens_steps_and_samples(runs):
    """60% of 5,120 tokens in batches from 64 to 256: the line passes 128 at 1,024 tokens and ends at 3,072."""
    result, watch = runs("growing")
    sizes = [m["batch_tokens"] for m in watch.metrics]
    assert sizes == [64] * 16 + [128] * 16 + [256] * 8
    assert watch.facts["steps"] == result.step == len(sizes) == 40
    assert watch.facts["tokens"] == result.tokens == sum(sizes) == 5120
    assert (watch.facts["first_batch_tokens"], watch.facts["batch_tokens"]) == (64, 256)
    # Validation each 2,560 tokens: the mark falls into the stage of 128.
    assert [m["tokens"] for m in watch.metrics if "val_loss" in m] == [2560, 5120]
    # The rate follows tokens: the warm-up's 512 tokens take 8 steps, each asking for its middle.
    assert [m["lr"] for m in watch.metrics[:9]] == pytest.approx([1e-2 * (k + 0.5) / 8 for k in range(8)] + [1e-2])
    state = torch.load(checkpoint.newest_checkpoint(result.run) / "training_state.pt", weights_only=True)
    assert state["progress"]["samples"] == 5120 // 32


def test_a_small_batch_has_its_own_mean(runs):
    """Loss and gradient of the first two sequences, beside torch's own mean cross-entropy over all logits."""
    _, growing = runs("growing")
    trainer = make_trainer(load_recipe("tiny.yaml", OVERRIDES["growing"]), Path("unused"), Recorder())
    inputs, targets = trainer.setup.loader.batch(0, 2)
    loss = F.cross_entropy(trainer.model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    assert growing.metrics[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]).item()
    assert growing.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_micro_batch_larger_than_the_first_batches_is_cut_to_them(runs):
    """Batches from 2 to 8 sequences, in passes of up to 8 and of 2: the same sums."""
    _, cut = start("tiny.yaml", *OVERRIDES["growing"], "train.micro_batch_size=8", name="cut")
    _, split = runs("growing")
    for a, b in zip(cut.metrics[:20], split.metrics[:20], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_longer_run_goes_on_from_a_finished_one_with_a_growing_batch():
    start("tiny.yaml", *OVERRIDES["growing"], name="grown")
    result, watch = resume("grown", "train.tokens=10240")
    assert result.tokens == 10240
    assert watch.facts["steps"] == result.step
    tokens = [5120, *(m["tokens"] for m in watch.metrics)]
    assert [after - before for before, after in itertools.pairwise(tokens)] == [
        m["batch_tokens"] for m in watch.metrics
    ]


def test_optimizer_and_batch_plan_are_fixed_in_a_resumed_run():
    start("tiny.yaml", "train.tokens=256", name="fixed")
    with pytest.raises(RecipeError, match=r"optimizer.name, schedule.batch_warmup, schedule.batch_start cannot change"):
        resume("fixed", "optimizer.name=muon", "schedule.batch_warmup=10%", "schedule.batch_start=64")
