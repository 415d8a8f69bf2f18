"""The hand-written CPU path beside the plain one: both compute the same, to the rounding of bf16."""

import copy

import pytest
import torch

from lightlm.model import fused
from lightlm.train.loss import token_loss
from tests.shapes import SHAPES, build

INPUTS, TARGETS = torch.randint(97, (3, 10)), torch.randint(97, (3, 10))


def gradients(model, *, dtype=None, plain=False):
    """Loss and gradients of one batch; `plain` takes the operations that other devices run."""
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(fused, "applies", lambda x: False)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = token_loss(model, INPUTS, TARGETS)
        (loss / TARGETS.numel()).backward()
    return loss.item(), {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", SHAPES)
def test_fused_training_is_as_exact_as_plain_autocast(name):
    """Both paths' gradients lie equally far from float64, and no parameter is forgotten."""
    model = build(name)
    exact_loss, exact = gradients(copy.deepcopy(model).double())
    plain_loss, plain = gradients(copy.deepcopy(model), dtype=torch.bfloat16, plain=True)
    fused_loss, ours = gradients(model, dtype=torch.bfloat16)
    assert fused_loss == pytest.approx(exact_loss, rel=2e-3)
    assert plain_loss == pytest.approx(exact_loss, rel=2e-3)
    for key, expected in exact.items():
        size = expected.norm()
        assert (ours[key] - expected).norm() <= 1.5 * (plain[key] - expected).norm() + 0.01 * size, key
    assert any(not torch.equal(ours[key], plain[key]) for key in exact), "the fused path did not run"


def test_gradients_are_fp32_and_dense():
    model = build("llama")
    gradients(model, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.layout == torch.strided, name


def test_kept_copies_are_exact_within_an_accumulation_and_renewed_after_it():
    model = build("llama")
    with fused.kept_weight_copies():
        first = gradients(model, dtype=torch.bfloat16)[0]
        assert gradients(model, dtype=torch.bfloat16)[0] == first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    renewed = gradients(model, dtype=torch.bfloat16)[0]
    assert renewed != first
    with fused.kept_weight_copies():
        assert gradients(model, dtype=torch.bfloat16)[0] == renewed


def test_long_batches_sum_their_weight_gradient_in_fp32(monkeypatch):
    """Pieces of tokens and of rows give the gradient of one piece, more exactly."""
    x, layer = torch.randn(40, 16), torch.nn.Linear(16, 24)
    weight = torch.randn(40, 24)

    def gradient():
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            (fused.linear(x, layer) * weight).sum().backward()
        return layer.weight.grad.double(), layer.bias.grad.double()

    whole, bias = gradient()
    monkeypatch.setattr(fused, "_GRADIENT_TOKENS", 8)
    monkeypatch.setattr(fused, "_PIECE", 32)
    pieces, _ = gradient()
    exact = weight.double().T @ x.double()
    assert (pieces - exact).norm() / exact.norm() < 0.01
    assert (whole - exact).norm() / exact.norm() < 0.01
    torch.testing.assert_close(bias, weight.double().sum(0), rtol=0.02, atol=0.1)
