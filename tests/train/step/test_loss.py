import pytest
import torch
import torch.nn.functional as F

from lightlm.train.step import loss as loss_module
from lightlm.train.step.loss import target_losses, token_loss, token_losses
from tests.shapes import build


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [3, 256])
def test_loss_and_gradients_match_cross_entropy(name, rows, monkeypatch):
    """Against torch's own cross-entropy over all logits in float64, tied and untied head, one and many chunks."""
    monkeypatch.setitem(loss_module._CHUNK, "cpu", rows)
    inputs, targets = torch.randint(97, (3, 10)), torch.randint(97, (3, 10))
    model, reference = build(name), build(name).double()
    loss = token_loss(model, inputs, targets)
    (loss / 30).backward()
    expected = F.cross_entropy(reference(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    (expected / 30).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (key, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, atol=1e-6, rtol=1e-4, msg=key)


def test_loss_under_autocast_is_close_and_accumulates_in_fp32(monkeypatch):
    """bf16 products with 8 significant bits, but sums over chunks do not lose small terms."""
    monkeypatch.setitem(loss_module._CHUNK, "cpu", 2)
    inputs, targets = torch.randint(97, (4, 16)), torch.randint(97, (4, 16))
    model, exact_model = build("qwen3"), build("qwen3")
    exact = token_loss(exact_model, inputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_loss(model, inputs, targets)
    loss.backward()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    grad = model.lm_head.weight.grad
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())
    torch.testing.assert_close(grad, exact_model.lm_head.weight.grad, atol=0.05, rtol=0.05)


def test_a_product_in_parts_is_the_product(monkeypatch):
    logits, weight, whole, parts = torch.randn(5, 12), torch.randn(12, 7), torch.empty(5, 7), torch.full((5, 7), 3.0)
    loss_module._multiply(logits, weight, whole)
    monkeypatch.setitem(loss_module._SUMMED, "cpu", 5)
    loss_module._multiply(logits, weight, parts)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, logits @ weight)


def test_validation_compiles_no_graph_for_each_number_of_targets():
    """Otherwise every batch of conversations compiles, until torch gives up compiling."""
    graphs, found = [], []
    compiled = torch.compile(target_losses, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=False)
    model, inputs = build("llama").eval(), torch.randint(97, (2, 10))
    for trained in (3, 7, 11):
        targets = torch.where(torch.arange(20).view(2, 10) < trained, inputs, -1)
        with torch.no_grad():
            compiled(model, inputs, targets, masked=True)
        found.append(len(graphs))
    assert found[0] == found[-1] > 0


def test_no_gradient_work_without_gradients():
    with torch.no_grad():
        loss = token_loss(build("llama"), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    assert not loss.requires_grad


@pytest.mark.parametrize("name", ["llama", "qwen3", "moe"])
@pytest.mark.parametrize("rows", [3, 256])
def test_the_loss_of_each_target_matches_cross_entropy(name, rows, monkeypatch):
    """In float64 by torch. Their fp32 sum is the training loss, bit for bit."""
    monkeypatch.setitem(loss_module._CHUNK, "cpu", rows)
    inputs, targets = torch.randint(97, (3, 10)), torch.randint(97, (3, 10))
    model, reference = build(name).eval(), build(name).double().eval()
    losses = target_losses(model, inputs, targets)
    assert not losses.requires_grad
    expected = F.cross_entropy(reference(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert losses.sum().item() == token_loss(model, inputs, targets).item()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert target_losses(model, inputs, targets).sum().item() == token_loss(model, inputs, targets).item()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [3, 256])
def test_z_loss_matches_autograd_in_float64(name, rows, monkeypatch):
    """The objective and its gradients; the loss beside it is the plain cross-entropy."""
    monkeypatch.setitem(loss_module._CHUNK, "cpu", rows)
    inputs, targets = torch.randint(97, (3, 10)), torch.randint(97, (3, 10))
    model, reference = build(name), build(name).double()
    sums = token_losses(model, inputs, targets, z_loss=0.03)
    (sums.objective / 30).backward()
    logits = reference(inputs).flatten(0, 1)
    entropy = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    z = logits.logsumexp(-1).square().sum()
    ((entropy + 0.03 * z) / 30).backward()
    assert sums.z.item() == pytest.approx(z.item(), rel=1e-6)
    assert sums.loss.item() == token_loss(model, inputs, targets).item()
    assert sums.objective.item() == pytest.approx((entropy + 0.03 * z).item(), rel=1e-6)
    assert not sums.loss.requires_grad
    assert not sums.z.requires_grad
    for (key, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, atol=1e-6, rtol=1e-4, msg=key)


def test_z_loss_under_autocast_is_close(monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK, "cpu", 5)
    inputs, targets = torch.randint(97, (4, 16)), torch.randint(97, (4, 16))
    model, exact_model = build("qwen3"), build("qwen3")
    exact = token_losses(exact_model, inputs, targets, z_loss=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        sums = token_losses(model, inputs, targets, z_loss=0.1)
    sums.objective.backward()
    exact.objective.backward()
    assert sums.z.item() == pytest.approx(exact.z.item(), rel=5e-3)
    grad, expected = model.lm_head.weight.grad, exact_model.lm_head.weight.grad
    assert (grad - expected).norm() < 0.02 * expected.norm()
