"""A run that resumes with more tokens or another schedule: what it does with the learning rate, and what it says."""

from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch import equal

from lightlm import checkpoint
from lightlm.errors import RecipeError
from lightlm.recipe import load_recipe, load_run_recipe
from lightlm.train.schedules import learning_rate_factor, notes_on_short_spans
from tests.corpus import STEADY
from tests.train.watch import Recorder, resume, start

SHORT = ("tiny.yaml", "eval.every=0", "eval.prompts=[]", "checkpoint.every=1280")  # 20 steps
PEAK = 0.01


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def rates(watch):
    return [metrics["lr"] for metrics in watch.metrics]


def about_the_rate(watch):
    return [note for note in watch.notes if "learning rate" in note]


def test_more_tokens_after_the_decay_are_announced_and_may_warm_up_again():
    start(*SHORT, name="extended")
    _, jumping = resume("extended", "train.tokens=7680", watch=Recorder(terminate_at=21))
    (note,) = about_the_rate(jumping)
    assert "the learning rate goes from 0 to 0.01, its peak, at once" in note
    assert "train.tokens was 5,120, and is 7,680 now" in note
    assert "schedule.rewarmup=" in note
    assert rates(jumping) == [PEAK]

    start(*SHORT, name="warmed")
    _, rising = resume("warmed", "train.tokens=10240", "schedule.rewarmup=10%")
    assert "rises again from 0" in about_the_rate(rising)[0]
    assert rates(rising)[:5] == pytest.approx([PEAK * share for share in (0.125, 0.375, 0.625, 0.875, 1)])
    run = Path("runs/warmed")
    assert load_run_recipe(run).schedule.rewarmup_from == 5120
    # A second extension begins a second rise.
    _, again = resume(str(run), "train.tokens=12800", "schedule.rewarmup=10%", watch=Recorder(terminate_at=41))
    assert rates(again) == pytest.approx([PEAK * 0.1 * 0.95])  # the decay begins too
    assert load_run_recipe(run).schedule.rewarmup_from == 10240


def test_a_changed_rate_is_named_as_the_cause():
    start(*SHORT, name="lowered", watch=Recorder(terminate_at=12))
    _, watch = resume("lowered", "optimizer.lr=0.004", watch=Recorder(terminate_at=13))
    (note,) = about_the_rate(watch)
    assert "goes from 0.01 to 0.004" in note
    assert "optimizer.lr was 0.01, and is 0.004 now" in note
    assert "train.tokens" not in note


def test_an_interrupted_rewarmup_continues_where_it_was():
    """As in a job that a cluster starts again with the same command."""
    for name, interruptions in (("steady", [None]), ("disturbed", [22, 24, None])):
        start(*SHORT, name=name)
        for step in interruptions:
            resume(name, "train.tokens=7680", "schedule.rewarmup=20%", watch=Recorder(terminate_at=step))
    steady, disturbed = (
        load_file(checkpoint.newest_checkpoint(Path("runs", name)) / "model.safetensors")
        for name in ("steady", "disturbed")
    )
    assert all(equal(steady[key], disturbed[key]) for key in steady)


def test_a_new_run_refuses_a_rewarmup():
    with pytest.raises(RecipeError, match=r"schedule\.rewarmup is for a run that resumes"):
        start(*SHORT, "schedule.rewarmup=10%", name="new-with-rewarmup")


def test_a_run_that_continues_as_planned_says_nothing():
    start(*SHORT, name="as-planned", watch=Recorder(terminate_at=12))
    _, watch = resume("as-planned")
    assert about_the_rate(watch) == []


def test_another_schedule_leaves_out_the_decay_and_says_what_the_rate_does():
    start(*SHORT, name="changed", watch=Recorder(terminate_at=12))
    _, watch = resume("changed", "schedule.name=cosine", watch=Recorder(terminate_at=13))
    assert any("schedule.decay 20% of" in note for note in watch.notes)
    (note,) = about_the_rate(watch)
    assert "the learning rate goes from 0.01 to 0.00" in note


def test_a_run_of_an_earlier_version_keeps_its_cosine_that_ends_early(workspace):
    """Such a recipe is refused today. A run that has it resumes with the rates that it had, and says what they are."""
    start(*SHORT, name="earlier", watch=Recorder(terminate_at=3))
    path = workspace / "runs/earlier/recipe.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["schedule"] = {"name": "cosine", "warmup": "10%", "decay": "20%", "min_lr_ratio": 0.0}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(RecipeError, match="leaves the last 70% of the run at rate 0"):
        load_recipe(path)
    _, watch = resume("earlier")
    assert rates(watch)[3:] == [0.0] * 14
    schedule = load_run_recipe(path.parent).schedule
    assert rates(watch)[:3] == [PEAK * learning_rate_factor(schedule, 256 * step + 128, 5120) for step in (3, 4, 5)]
    assert any("is 0 from 1.54K of 5.12K tokens on" in note for note in watch.notes)


def test_data_read_too_often_is_named_at_the_start(workspace):
    from lightlm.data.folder import DataFolder

    tokens = len(DataFolder.open(workspace / "data/tiny").split("train"))
    _, watch = start(*SHORT, f"train.tokens={20 * tokens}", name="repeats", watch=Recorder(terminate_at=1))
    assert any("20 times" in note for note in watch.notes)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("schedule.decay=20", True),
        ("schedule.warmup=20%", False),
        ("schedule.weight_decay=[[0, 1], [20, 0.1]]", True),
        ("optimizer={name: muon, lr: 1e-3, momentum_start: 0.85, momentum_warmup: 20}", True),
        ("train.ema=20", True),
    ],
)
def test_a_span_below_a_batch_is_named_with_its_tokens(override, named):
    notes = list(notes_on_short_spans(load_recipe(STEADY, [override])))
    assert len(notes) == named
    assert all("20 tokens, less than one batch of 4,096" in note and "as 2%" in note for note in notes)


@pytest.mark.parametrize("key", ["eval.every", "eval.tasks_every", "checkpoint.every", "checkpoint.keep_every"])
def test_an_interval_below_a_batch_is_named(key):
    more = ["eval.tasks=[arc_easy]"] if key == "eval.tasks_every" else []
    for every, named in (("0", False), ("100", True), ("4096", False)):
        notes = list(notes_on_short_spans(load_recipe(STEADY, [*more, f"{key}={every}"])))
        assert len(notes) == named
        assert all(f"{key} is 100 tokens, less than one batch of 4,096" in note for note in notes)


def test_a_half_life_below_a_batch_is_named():
    for half_life, named in (("4095", True), ("4096", False)):
        notes = list(notes_on_short_spans(load_recipe(STEADY, [f"optimizer.beta2_half_life={half_life}"])))
        assert len(notes) == named
        assert all("optimizer.beta2_half_life is 4,095 tokens, less than one batch of 4,096" in n for n in notes)
