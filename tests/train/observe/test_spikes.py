import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.recipe import TrainSection, load_recipe
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.observe.spikes import MAX_IN_A_ROW, SpikeHistory, judge
from lightlm.train.trainer import TrainingDivergedError
from tests.train.watch import Recorder, comparable, make_trainer

# Small enough for 20 steps: judged from step 5 on. At the recipe's own rate of 1e-2 one bad step upsets the next three.
SPIKY = ["train.spike_window=8", "train.spike_threshold=6", "optimizer.lr=2e-3"]
SKIP = [*SPIKY, "train.skip_spikes=true"]


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def section(**changes):
    return TrainSection(tokens=1, batch_tokens=1, **changes)


def history(values, norms=None):
    return SpikeHistory(tuple(values), tuple(norms or values))


def test_the_bound_is_so_many_robust_deviations_above_the_median():
    values = np.random.default_rng(0).normal(3.0, 0.2, 128)
    deviation = np.median(np.abs(values - np.median(values))) / 0.6744897501960817  # the normal's third quartile
    bound = np.median(values) + 6 * deviation
    before = history(values.tolist(), [1.0] * 128)
    assert not judge(before, bound - 1e-3, 1.0, section()).reason
    verdict = judge(before, bound + 1e-3, 1.0, section())
    assert verdict.reason
    assert not verdict.skip
    assert "loss" in verdict.reason
    assert "gradient norm" not in verdict.reason


def test_gradient_norms_are_judged_too_and_falls_are_no_spikes():
    before = history([3.0, 3.1, 2.9] * 22, [1.0, 1.2, 0.8] * 22)
    assert "gradient norm 9, median of the last 66 steps 1 " in judge(before, 3.0, 9.0, section()).reason
    assert not judge(before, 0.1, 0.01, section()).reason


def test_nothing_is_judged_before_half_the_window():
    assert not judge(history([1.0, 1.1, 0.9] * 21), 100.0, 100.0, section()).reason  # 63 of 128 steps
    assert judge(history([1.0, 1.1, 0.9] * 22), 100.0, 100.0, section()).reason


def test_a_loss_that_hardly_varies_makes_no_spike_of_nothing():
    before = history([2.0] * 100)
    assert not judge(before, 2.1, 2.0, section()).reason
    assert judge(before, 2.13, 2.0, section()).reason


def test_spikes_in_the_window_do_not_hide_the_next_one():
    assert judge(history([3.0, 3.1, 2.9, 3.05] * 30 + [50.0] * 8), 6.0, 3.0, section()).reason


def test_a_new_level_is_accepted_after_so_many_skips():
    state, skips = history([3.0, 3.1, 2.9] * 40), []
    for _ in range(100):
        verdict = judge(state, 8.0, 3.0, section(skip_spikes=True))
        state = verdict.history
        skips.append(verdict.skip)
        assert not verdict.diverged
    assert skips == [True] * MAX_IN_A_ROW + [False] * (100 - MAX_IN_A_ROW)
    assert not judge(state, 8.0, 3.0, section(skip_spikes=True)).reason


def test_no_number_ends_training_unless_skipped_and_never_enters_the_history():
    assert judge(SpikeHistory(), math.nan, 1.0, section()).diverged
    state = SpikeHistory()
    for _ in range(MAX_IN_A_ROW):
        verdict = judge(state, 1.0, math.inf, section(skip_spikes=True))
        assert verdict.skip
        assert not verdict.diverged
        state = verdict.history
    assert state == SpikeHistory(in_a_row=MAX_IN_A_ROW)
    assert judge(state, 1.0, math.inf, section(skip_spikes=True)).diverged


class Poisoned(Recorder):
    """A run whose batches of some steps have targets that no text has, found by their place in the data."""

    def __init__(self, steps, terminate_at=None):
        super().__init__(terminate_at)
        self.steps = steps

    def run(self, trainer):
        plain, per_step = trainer.setup.loader.batch, trainer.recipe.batch_sequences

        def batch(start, count):
            step = start // per_step + 1
            inputs, targets = plain(start, count)
            return (inputs, torch.full_like(targets, 7)) if step in self.steps else (inputs, targets)

        trainer.setup.loader.batch = batch
        return trainer.train()


def poisoned_run(name, steps, *overrides, terminate_at=None):
    watch = Poisoned(steps, terminate_at)
    trainer = make_trainer(load_recipe("tiny.yaml", overrides), name, watch)
    return watch.run(trainer), watch


def resumed_run(name, steps):
    watch = Poisoned(steps)
    recipe, run, saved = reopen_run(name, [])
    return watch.run(make_trainer(recipe, run, watch, checkpoint=saved)), watch


def state(run, step):
    folder = run / "checkpoints" / f"step_{step:06d}"
    return load_file(folder / "model.safetensors"), torch.load(folder / "training_state.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_spike_is_marked_and_by_default_the_step_is_taken():
    every_step = ["checkpoint.every=256", "checkpoint.keep_last=20"]
    result, watch = poisoned_run("taken", {10}, *SPIKY, *every_step)
    assert [m["step"] for m in watch.metrics if m.get("spike")] == [10]
    assert not any("skipped" in m for m in watch.metrics)
    [note] = [note for note in watch.notes if "spike" in note]
    assert note.startswith("spike at step 10: gradient norm 5.9")
    assert "skipped" not in note
    assert not same(state(result.run, 9)[0], state(result.run, 10)[0])
    _, blind = poisoned_run("blind", {10}, *SPIKY, "train.spike_threshold=1e9")
    assert [m["loss"] for m in blind.metrics] == [m["loss"] for m in watch.metrics]


def test_a_skipped_step_counts_and_consumes_its_batch_and_changes_nothing_else():
    result, watch = poisoned_run("skipped", {10}, *SKIP, "checkpoint.every=256", "checkpoint.keep_last=20")
    assert [m["step"] for m in watch.metrics if m.get("skipped")] == [10]
    assert any(note.startswith("spike at step 10") and note.endswith("the step is skipped") for note in watch.notes)
    (before, old), (after, new) = state(result.run, 9), state(result.run, 10)
    assert same(before, after)
    assert old["optimizer"].keys() == new["optimizer"].keys()
    for name, values in old["optimizer"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(new["optimizer"][name][k])) for k, v in values.items()
        )
    assert new["progress"]["samples"] - old["progress"]["samples"] == 8
    assert new["progress"]["step"] == 10
    assert result.step == 20
    assert not same(after, state(result.run, 11)[0])


def test_skipping_resumes_bit_for_bit():
    """Step 13 is a spike only to those who remember the steps before 11, where the run is resumed."""
    steps = {9, 13}
    whole, watch = poisoned_run("spiky-whole", steps, *SKIP)
    assert [m["step"] for m in watch.metrics if m.get("skipped")] == [9, 13]
    _, before = poisoned_run("spiky-cut", steps, *SKIP, terminate_at=11)
    result, after = resumed_run("spiky-cut", steps)
    assert comparable(before.metrics + after.metrics) == comparable(watch.metrics)
    assert same(state(whole.run, 20)[0], state(result.run, 20)[0])
    assert state(whole.run, 20)[1]["progress"]["spikes"] == state(result.run, 20)[1]["progress"]["spikes"]


def nan_run(name, steps, *overrides):
    watch = Recorder()
    trainer = make_trainer(load_recipe("tiny.yaml", overrides), name, watch)

    def poison(module, inputs, output):
        return output * math.nan if trainer.model.training and trainer.progress.step + 1 in steps else output

    trainer.model.norm.register_forward_hook(poison)
    return trainer, watch


def test_no_number_is_skipped_and_written_as_null():
    trainer, watch = nan_run("nan-skipped", {4, 5}, *SKIP)
    result = trainer.train()
    assert [m["step"] for m in watch.metrics if m.get("skipped")] == [4, 5]
    assert len([note for note in watch.notes if "spike" in note]) == 1

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (result.run / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [m["step"] for m in metrics if m["loss"] is None] == [4, 5]
    assert all(tensor.isfinite().all() for tensor in state(result.run, 20)[0].values())


def test_too_many_in_a_row_end_training_and_keep_the_last_good_checkpoint():
    trainer, watch = nan_run("nan-forever", set(range(6, 30)), *SKIP)
    with pytest.raises(TrainingDivergedError, match=f"diverged at step {6 + MAX_IN_A_ROW}"):
        trainer.train()
    assert len(watch.metrics) == 5 + MAX_IN_A_ROW
    kept = checkpoint.newest_checkpoint(trainer.run_folder)
    assert checkpoint.load_model(kept).model.embed_tokens.weight.isfinite().all()
