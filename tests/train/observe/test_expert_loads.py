"""What metrics.jsonl says about the experts, against NumPy and by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lightlm import checkpoint
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.train.observe.expert_loads import layers_are_due, load_metrics
from lightlm.train.observe.observers import Observers
from lightlm.train.observe.trackers import BACKENDS, Trackers
from tests.train.watch import Recorder, comparable, make_trainer, resume, start

DOCS = Path(__file__).parents[3] / "docs"
# Two layers of eight experts above a dense one, two experts per token, four micro-batches per step.
EXPERTS = (
    "model.num_layers=3",
    "model.first_k_dense=1",
    "model.num_experts=8",
    "model.num_experts_per_tok=2",
    "model.moe_intermediate_size=16",
    "moe.bias_update_rate=0.02",
)
SHAPE = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=2, max_seq_len=16, vocab_size=50, num_experts=4, num_experts_per_tok=1,
    norm_topk_prob=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def run(workspace):
    """An uninterrupted run: its folder, and its metrics as the file has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        result, _ = start("tiny.yaml", *EXPERTS, name="experts")
        lines = (result.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return workspace / result.run, [json.loads(line) for line in lines]


def test_figures_of_a_run_follow_from_its_loads(run):
    for metrics in run[1]:
        load = np.array(metrics["moe/load"], dtype=np.float64)
        assert load.shape == (2, 8)
        assert load.sum(1).tolist() == [2 * 256] * 2
        violation = load.max(1) / 64 - 1
        share = load / 512
        entropy = -np.sum(share * np.log(share, where=share > 0, out=np.zeros_like(share)), axis=1) / np.log(8)
        np.testing.assert_allclose(metrics["moe/layer_violation"], violation, rtol=1e-4)
        np.testing.assert_allclose(metrics["moe/layer_entropy"], entropy, rtol=1e-4)
        expected = [violation.mean(), violation.max(), entropy.mean(), entropy.min()]
        keys = ["moe/violation", "moe/violation_worst", "moe/entropy", "moe/entropy_lowest"]
        np.testing.assert_allclose([metrics[key] for key in keys], expected, rtol=1e-4)
        assert metrics["moe/layer_dead_experts"] == (load == 0).sum(1).tolist()
        assert metrics["moe/dead_experts"] == (load == 0).sum()
        assert metrics["moe/dropped"] == 0
    assert len({json.dumps(metrics["moe/load"]) for metrics in run[1]}) > 10


def test_the_bias_range_is_that_after_the_update_and_of_the_checkpoint(run):
    folder, rows = run
    bias = np.zeros((2, 8))
    for metrics in rows:
        bias += 0.02 * np.sign(64 - np.array(metrics["moe/load"]))
        np.testing.assert_allclose(metrics["moe/layer_bias_range"], np.ptp(bias, axis=1), rtol=1e-4, atol=1e-6)
        assert metrics["moe/bias_range"] == max(metrics["moe/layer_bias_range"])
    weights = load_file(checkpoint.newest_checkpoint(folder) / "model.safetensors")
    saved = np.stack([weights[key] for key in sorted(weights) if key.endswith("selection_bias")])
    np.testing.assert_allclose(saved, bias, atol=1e-6)


def test_a_resumed_run_has_the_same_figures(run):
    result, _ = start("tiny.yaml", *EXPERTS, name="stopped", watch=Recorder(terminate_at=13))
    assert result.interrupted
    resumed, _ = resume("stopped")
    rows = [json.loads(line) for line in (resumed.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert comparable(rows) == comparable(run[1])
    assert "moe/load" in comparable(rows)[-1]


def test_every_figure_is_documented_and_a_dense_run_has_none(run):
    table = re.findall(r"^\| (`\S+?`(?:, `\S+?`)*)", (DOCS / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {key for cell in table for key in re.findall(r"`(\S+?)`", cell)}
    assert {key for metrics in run[1] for key in metrics} <= documented
    _, dense = start("tiny.yaml", "train.tokens=256", name="dense")
    assert not any(key.startswith("moe/") for key in dense.metrics[0])


def test_trackers_get_the_scalars_alone(monkeypatch):
    class Kept:
        package, id, where, sent, logged = "json", "kept", "nowhere", 0, []

        def __init__(self, session): ...
        def log(self, step, metrics):
            self.logged.append(metrics)

        def sample(self, step, prompt, text): ...
        def flush(self): ...
        def finish(self, failed): ...

    monkeypatch.setitem(BACKENDS, "tensorboard", Kept)
    from lightlm.recipe import load_recipe

    watch = Recorder()
    recipe = load_recipe("tiny.yaml", [*EXPERTS, "train.tokens=512", "tracking.backends=[tensorboard]"])
    trackers = Trackers(recipe.tracking, watch.note)
    with trackers:
        make_trainer(recipe, "tracked", Observers(watch, trackers)).train()
    assert [note for note in watch.notes if "failed" in note] == []
    for logged, metrics in zip(Kept.logged, watch.metrics, strict=True):
        scalars = {key: value for key, value in metrics.items() if key.startswith("moe/") and np.isscalar(value)}
        assert len(scalars) == 7
        assert {key: value for key, value in logged.items() if key.startswith("moe/")} == scalars


def test_figures_by_hand():
    model = Transformer(SHAPE)
    metrics = load_metrics(model, 1, 8, [[8, 0, 0, 0], [4, 4, 0, 0]])
    assert (metrics["moe/layer_violation"], metrics["moe/layer_entropy"]) == ([3, 1], [0, 0.5])
    assert (metrics["moe/violation"], metrics["moe/violation_worst"]) == (2, 3)
    assert (metrics["moe/entropy"], metrics["moe/entropy_lowest"]) == (0.25, 0)
    assert (metrics["moe/layer_dead_experts"], metrics["moe/dead_experts"]) == ([3, 2], 5)
    assert metrics["moe/dropped"] == 0
    assert load_metrics(model, 1, 8, [[2, 2, 2, 1], [2, 2, 2, 2]])["moe/dropped"] == 1
    assert load_metrics(Transformer(replace(SHAPE, num_experts=1)), 1, 8, [[8], [8]])["moe/entropy"] == 1


def test_routers_without_a_bias_have_no_range_and_repeated_layers_the_same():
    softmax = load_metrics(Transformer(replace(SHAPE, router="softmax")), 1, 8, [[2, 2, 2, 2]] * 2)
    assert not any("bias" in key for key in softmax)
    model = Transformer(replace(SHAPE, layer_sharing=2))
    model.blocks[1].mlp.router.selection_bias[2] = -0.25
    metrics = load_metrics(model, 1, 8, [[2, 2, 2, 2]] * 4)
    assert (metrics["moe/layer_bias_range"], metrics["moe/bias_range"]) == ([0, 0, 0.25, 0.25], 0.25)


def test_figures_by_layer_come_128_to_a_doubling():
    due = [step for step in range(1, 2**15 + 1) if layers_are_due(step)]
    assert due[:256] == list(range(1, 257))
    for power in range(8, 15):
        assert sum(2**power < step <= 2 ** (power + 1) for step in due) == 128
    lean = load_metrics(Transformer(SHAPE), 257, 8, [[2, 2, 2, 2]] * 2)
    assert not any(isinstance(value, list) for value in lean.values())


def test_a_line_of_a_large_run_stays_short():
    """29 layers of 16 experts, 512K tokens per batch, eight experts per token."""
    config = replace(SHAPE, num_layers=30, first_k_dense=1, num_experts=16, num_experts_per_tok=8)
    loads = np.random.default_rng(0).multinomial(2**22, np.full(16, 1 / 16), size=29).tolist()
    model = Transformer(config)
    lengths = {step: len(json.dumps(load_metrics(model, step, 2**19, loads))) for step in (257, 258)}
    assert lengths[257] < 200
    assert lengths[258] < 6000
