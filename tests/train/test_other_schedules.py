"""Weight decay and momentum over a run: their formulas, the recipes that are refused, and whole runs."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm import checkpoint
from lightlm.errors import RecipeError
from lightlm.recipe import ScheduleSection, load_recipe
from lightlm.train.observe.metrics import read_metrics
from lightlm.train.schedules import describe_other_schedules, step_settings, weight_decay_factor
from tests.corpus import STEADY
from tests.train.group import together, train_together
from tests.train.watch import Recorder, comparable, resume, start

NORMUON = (
    "{name: normuon, lr: 1e-2, weight_decay: 0.5, cautious: true, orthogonalization: polar_express, momentum: 0.97, "
    "momentum_start: 0.85, momentum_warmup: 20%, momentum_end: 0.9, beta2_half_life: 2K, embedding_betas: [0.8, 0.99]}"
)
HOLD_DROP_RAISE = "[[0%, 1], [13%, 1], [53%, 0.125], [100%, 1.16]]"
SCHEDULED = [f"optimizer={NORMUON}", f"schedule.weight_decay={HOLD_DROP_RAISE}"]
GROWING = ("schedule.batch_warmup=60%", "schedule.batch_start=64")


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def decays(shape, tokens, total=1000):
    return [weight_decay_factor(ScheduleSection(weight_decay=shape), at, total) for at in tokens]


def test_weight_decay_falls_in_a_line_or_a_cosine_or_stays():
    assert decays("constant", [0, 999]) == [1, 1]
    assert decays("linear", [0, 250, 1000]) == pytest.approx([1, 0.75, 0])
    assert decays("cosine", [0, 250, 500, 1000]) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 30)), min_size=1, max_size=6, unique_by=lambda p: p[0]))
@settings(max_examples=50)
def test_points_are_joined_by_lines(points):
    points.sort()
    at = np.arange(0, 1001, 7)
    expected = np.interp(at, *zip(*points, strict=True))
    np.testing.assert_allclose(decays(points, at.tolist()), expected, atol=1e-9)


def test_two_points_at_one_place_are_a_jump():
    points = [["10%", 1], ["50%", 1], ["50%", 0.1], [1000, 2]]
    assert decays(points, [0, 499, 500, 750, 1000]) == pytest.approx([1, 1, 0.1, 1.05, 2])


def momenta(tokens, schedule="{name: wsd, warmup: 0%, decay: 40%}", **keys):
    given = {"name": "muon", "momentum": 0.97} | keys
    recipe = load_recipe(STEADY, [f"optimizer={yaml.safe_dump({'lr': 0.01} | given)}", f"schedule={schedule}"])
    return [step_settings(recipe, at, 0, 1000).momentum for at in tokens]


def test_momentum_rises_at_the_start_and_follows_the_rates_decay():
    """nanochat's: 0.85 to 0.97 over its first steps, and to 0.90 over the decay."""
    ends = {"momentum_start": 0.85, "momentum_warmup": "20%", "momentum_end": 0.90}
    at = [0, 100, 200, 600, 800, 1000]
    assert momenta(at, **ends) == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935, 0.90])
    assert momenta([0, 1000], momentum_start=0.85) == pytest.approx([0.85, 0.97])
    assert momenta([0, 600, 1000], momentum_end=0.9) == pytest.approx([0.97, 0.97, 0.9])
    assert momenta([0, 1000]) == [None, None]
    # A cosine decays from the warmup on, over half the run; the momentum then stays.
    cosine = "{name: cosine, warmup: 10%, decay: 50%, min_lr_ratio: 0.1}"
    assert momenta([100, 350, 600, 1000], cosine, momentum_end=0.9) == pytest.approx([0.97, 0.935, 0.9, 0.9])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.weight_decay=0.1"], "schedule.weight_decay: write constant, linear, cosine, or points such as"),
        (["schedule.weight_decay=cosin"], "write constant, linear, cosine, or points .*not 'cosin'"),
        (["schedule.weight_decay=[]"], "write constant, linear, cosine, or points"),
        (["schedule.weight_decay=[[0%, -1]]"], "schedule.weight_decay.0.1: should be greater than or equal to 0"),
        (["schedule.weight_decay=[[0%, 1], [120%, 1]]"], "schedule.weight_decay.1.0: write a share of the run"),
        (["schedule.weight_decay=[[50%, 1], [10%, 2]]"], "point 10% comes after 50%; write the points in the order"),
        (["schedule.weight_decay=[[0, 1], [2M, 0]]"], "point 2M lies beyond the run's 1,500,000 tokens"),
        (
            ["schedule.weight_decay=cosine", "optimizer.weight_decay=0"],
            "schedule.weight_decay: has no effect without optimizer.weight_decay",
        ),
        (
            ["optimizer={name: muon, lr: 1e-3, momentum_end: 0.9}", "schedule={name: constant}"],
            "optimizer.momentum_end: has no effect without a decay of the learning rate",
        ),
        (
            ["optimizer={name: muon, lr: 1e-3, momentum_end: 0.9}", "schedule.decay=0%"],
            "optimizer.momentum_end: has no effect without a decay of the learning rate",
        ),
        (
            ["optimizer={name: muon, lr: 1e-3, momentum_start: 0.9, momentum_warmup: 0%}"],
            "optimizer.momentum_start: has no effect with a momentum_warmup of 0",
        ),
        (
            ["optimizer={name: muon, lr: 1e-3, momentum_warmup: 5%}"],
            "optimizer.momentum_warmup: has no effect without momentum_start",
        ),
        (
            ["optimizer={name: muon, lr: 1e-3, momentum_start: 0.85, momentum_warmup: 3M}"],
            "optimizer.momentum_warmup: 3M exceeds the run's 1,500,000 tokens",
        ),
        (["optimizer.momentum_start=0.85"], "momentum_start: has no effect with optimizer.name=adamw"),
        (["optimizer.orthogonalization=polar_express"], "orthogonalization: has no effect with optimizer.name=adamw"),
        (["optimizer.head_betas=[0.8, 0.9]"], "optimizer.head_betas: has no effect with model.tie_embeddings"),
        (["optimizer.betas=[0.9, null]"], "optimizer.betas: has a null beta2; write a number such as 0.95, or set"),
        (["optimizer.beta2_half_life=0"], "optimizer.beta2_half_life: should be greater than 0"),
        (
            ["optimizer.beta2_half_life=10M", "optimizer.betas=[0.9, 0.95]"],
            r"optimizer.beta2_half_life: has no effect with betas=\[0.9, 0.95\]; write null",
        ),
        (
            [
                "optimizer={name: muon, lr: 1e-3, betas: [0.8, 0.9], embedding_betas: [0.9, 0.9], "
                "scalar_betas: [0.9, 0.9]}"
            ],
            "optimizer.betas: has no effect with embedding_betas, scalar_betas",
        ),
    ],
)
def test_settings_without_effect_or_sense_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(STEADY, overrides)


def test_a_resolved_recipe_reads_back_as_it_is():
    recipe = load_recipe(STEADY, SCHEDULED)
    assert recipe.optimizer.betas == (0.9, None)
    assert (
        load_recipe(STEADY, [f"{k}={yaml.safe_dump(v)}" for k, v in recipe.to_dict().items() if k != "name"]) == recipe
    )


def test_other_schedules_in_words():
    texts = describe_other_schedules(load_recipe(STEADY, SCHEDULED))
    assert texts == {
        "weight decay": "0.5, constant to step 48 (195K tokens), -> 0.0625 at step 195 (797K tokens), -> 0.58 at step "
        "367 (1.5M tokens)",
        "momentum": "0.85 -> 0.97 at step 74 (301K tokens), constant to step 294 (1.2M tokens), -> 0.9 at step 367 "
        "(1.5M tokens)",
    }
    assert describe_other_schedules(load_recipe(STEADY)) == {}
    assert describe_other_schedules(load_recipe(STEADY, ["schedule.weight_decay=cosine"])) == {
        "weight decay": "0.1 -> 0 at step 367 (1.5M tokens) (cosine)"
    }
    jump = describe_other_schedules(load_recipe(STEADY, ["schedule.weight_decay=[[50%, 1], [50%, 0]]"]))
    assert jump["weight decay"].startswith("0.1, constant to step 184 (752K tokens), then 0 at once, constant to")


@pytest.fixture(scope="module")
def whole(workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return start("tiny.yaml", *SCHEDULED, *GROWING, name="scheduled")


def test_a_run_logs_what_its_schedules_say(whole):
    _, watch = whole
    middles = [row["tokens"] - row["batch_tokens"] // 2 for row in watch.metrics]
    corners = [0, 0.13 * 5120, 0.53 * 5120, 5120]
    shares = np.interp(middles, [round(corner) for corner in corners], [1, 1, 0.125, 1.16])
    assert [row["weight_decay"] for row in watch.metrics] == pytest.approx(list(0.5 * shares))
    expected = np.interp(middles, [0, 1024, 4096, 5120], [0.85, 0.97, 0.97, 0.9])
    assert [row["momentum"] for row in watch.metrics] == pytest.approx(list(expected))
    assert watch.metrics[-1]["loss"] < watch.metrics[0]["loss"] - 0.5


def test_interrupted_scheduled_runs_continue_bit_for_bit(whole):
    """At 11 of 40 steps, with a growing batch, which changes beta2."""
    result, _ = whole
    start("tiny.yaml", *SCHEDULED, *GROWING, name="scheduled-stopped", watch=Recorder(terminate_at=11))
    after, _ = resume("scheduled-stopped")
    assert comparable(read_metrics(after.run)) == comparable(read_metrics(result.run))
    states = [
        torch.load(checkpoint.newest_checkpoint(run) / "training_state.pt", weights_only=True)["optimizer"]
        for run in (result.run, after.run)
    ]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][name][k])) for k, v in state.items()), name


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one_and_resume(whole, workspace, monkeypatch, parallel):
    name, overrides = f"scheduled-{parallel}", (*SCHEDULED, *GROWING, f"train.parallel={parallel}")
    (first_rows, _, interrupted), _ = together(2, train_together, name, overrides, 25)
    (last_rows, _, _), _ = together(2, train_together, name, (), None, 0, True)
    assert interrupted
    for row, expected in zip(first_rows + last_rows, whole[1].metrics, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=2e-5)


def test_a_longer_run_stretches_its_schedules_and_may_change_rates_but_not_the_optimizer():
    start("tiny.yaml", *SCHEDULED, name="scheduled-longer")
    with pytest.raises(RecipeError, match=r"optimizer.name cannot change in a resumed run"):
        resume("scheduled-longer", "optimizer.name=muon")
    changes = ("train.tokens=10240", "optimizer.momentum_end=0.8", "optimizer.beta2_half_life=1K")
    _, watch = resume("scheduled-longer", *changes)
    middles = [row["tokens"] - 128 for row in watch.metrics]
    expected = np.interp(middles, [2048, 8192, 10240], [0.97, 0.97, 0.8])
    assert [row["momentum"] for row in watch.metrics] == pytest.approx(list(expected))


def test_a_skipped_step_leaves_the_moments_alone(monkeypatch):
    """The half-lives count the tokens of steps that were taken."""
    from lightlm.train import trainer as module

    judge = module.judge
    skips = itertools.count()

    def skip_third(history, loss, norm, settings):
        verdict = judge(history, loss, norm, settings)
        return type(verdict)(**(vars(verdict) | {"skip": next(skips) == 2}))

    monkeypatch.setattr(module, "judge", skip_third)
    result, _ = start("tiny.yaml", "optimizer.beta2_half_life=1K", "train.tokens=1280", name="skipping")
    path = checkpoint.newest_checkpoint(result.run) / "training_state.pt"
    state = torch.load(path, weights_only=True)["optimizer"]["norm.weight"]
    assert (state["step"].item(), state["half_lives"]) == (4, pytest.approx(4 * 256 / 1000))
