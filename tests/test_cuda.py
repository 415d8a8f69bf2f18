"""Tests that need a GPU; `make gpu-check` runs them. They are skipped elsewhere."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightlm.evaluate.scoring.batches import BatchSize
from lightlm.evaluate.scoring.score import score
from lightlm.generate.engine import generate
from lightlm.generate.sampling import GREEDY
from lightlm.train.step.parallel import LossModule, MicroBatch
from lightlm.train.step.routers import RouterLosses
from tests.corpus import make_workspace
from tests.shapes import SHAPES, build
from tests.train.watch import Recorder, comparable, resume, start

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GROUPED = [name for name, config in SHAPES.items() if config.num_kv_heads not in (0, 4)]


@pytest.fixture
def _in_workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(make_workspace(tmp_path))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_the_cpu(name):
    model, tokens = build(name), torch.randint(97, (2, 40))
    with torch.no_grad():
        expected = model(tokens)
        found = model.cuda()(tokens.cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_scores_and_greedy_text_are_those_of_the_cpu(name):
    model = build(name)
    pairs = [([1, 2, first], [3, 4]) for first in range(20)]
    expected = score(model, pairs, BatchSize(512)), generate(model, [[1, 2, 3]], 12, GREEDY)
    model = model.cuda()
    found = score(model, pairs, BatchSize(512)), generate(model, [[1, 2, 3]], 12, GREEDY)
    assert [s.log_likelihood for s in found[0]] == pytest.approx([s.log_likelihood for s in expected[0]], abs=1e-2)
    assert found[1][0].ids == expected[1][0].ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPED)
def test_no_attention_falls_back_to_the_plain_one(name, dtype):
    """With keys of heads of 8 elements or more; the plain kernel holds all scores."""
    model, tokens = build(name).cuda().to(dtype), torch.randint(97, (2, 40), device="cuda")
    cache = model.new_cache(2, 48)
    with torch.no_grad(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        model(tokens)
        model(tokens, cache)
        model(tokens[:, :1], cache)


@pytest.mark.parametrize("name", ["gpt3", "gated", "shared"])  # masks, and blocks of keys with and without a band
@pytest.mark.parametrize("compiled", [False, True])
def test_documents_are_those_of_the_cpu(name, compiled):
    tokens = torch.randint(12, (2, 49), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        module = LossModule(build(name).to(device), RouterLosses(), separator=3)
        if compiled and device == "cuda":
            module.compile()
        result = module(MicroBatch(tokens[:, :-1].to(device), tokens[:, 1:].contiguous().to(device)))
        result.objective.backward()
        losses.append(result.loss.item())
        gradients.append([parameter.grad.cpu() for parameter in module.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.usefixtures("_in_workspace")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_learns_and_resumes_exactly(dtype):
    changes = ("tiny.yaml", "train.device=cuda:0", f"train.dtype={dtype}", "train.compile=false", "train.tokens=2560")
    _, watch = start(*changes, name=f"cuda-{dtype}")
    assert watch.metrics[-1]["loss"] < watch.metrics[0]["loss"]
    stopped = Recorder(terminate_at=5)
    start(*changes, name=f"cuda-{dtype}-stopped", watch=stopped)
    _, rest = resume(f"cuda-{dtype}-stopped")
    first, second = (comparable(rows) for rows in (watch.metrics, stopped.metrics + rest.metrics))
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=1e-5)
