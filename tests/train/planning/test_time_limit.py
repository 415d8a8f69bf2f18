import pytest

from lightlm.data.training_data import TrainingData
from lightlm.recipe import load_recipe
from lightlm.train.planning import time_limit
from lightlm.train.planning.plan import run_seconds, run_sizes
from lightlm.train.planning.probe import Probe
from lightlm.train.planning.time_limit import fit_probe


@pytest.fixture
def data(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return TrainingData.open(load_recipe("tiny.yaml").data)


def probe(pass_seconds):
    return Probe(
        micro_batch=2, pass_seconds=pass_seconds, update_seconds=0.1, forward_seconds=pass_seconds / 3, memory=None,
        process_memory=None,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", [[], ["schedule.batch_warmup=20%", "schedule.batch_start=64"]])
def test_a_run_gets_the_whole_batches_that_fit(data, schedule):
    recipe = load_recipe("tiny.yaml", ["train.tokens=1M", "eval.every=10K", *schedule])
    slow = probe(1.0)
    fit = fit_probe(slow, recipe, data, minutes=10)
    batch = recipe.train.batch_tokens
    assert fit.tokens % batch == 0
    assert fit.seconds == run_seconds(slow, recipe, run_sizes(recipe, data)) > 600

    def seconds(tokens):
        shorter = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": tokens})})
        return run_seconds(slow, shorter, run_sizes(shorter, data))

    assert seconds(fit.tokens) <= 540 < seconds(fit.tokens + batch)  # a tenth is reserved
    late = fit_probe(slow, recipe, data, minutes=10, spent=100)
    assert seconds(late.tokens) <= 450 < seconds(late.tokens + batch)
    assert fit_probe(probe(1e-4), recipe, data, minutes=1e6).tokens == recipe.train.tokens


def test_a_limit_too_short_for_a_step_leaves_one(data):
    recipe = load_recipe("tiny.yaml")
    assert fit_probe(probe(100.0), recipe, data, minutes=0.01).tokens == recipe.train.batch_tokens
    assert fit_probe(probe(1.0), recipe, data, minutes=1, spent=90).tokens == recipe.train.batch_tokens


def test_the_start_and_the_probe_count(data, monkeypatch):
    recipe, now = load_recipe("tiny.yaml", ["train.tokens=1M"]), [1000.0]

    def slow_start(recipe):
        now[0] += 40.0
        return probe(1.0)

    monkeypatch.setattr(time_limit, "run_probe", slow_start)
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    shorter, whole = (time_limit.fit_time(recipe, data, 10, began).tokens for began in (940.0, None))
    assert shorter == fit_probe(probe(1.0), recipe, data, 10, spent=100.0).tokens < whole
