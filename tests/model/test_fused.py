"""The hand-written CPU path and the plain one compute the same, to the rounding of bf16."""

import copy

import pytest
import torch

from lightlm.model import fused
from lightlm.train.step.loss import token_loss
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
    """Both paths' gradients are equally far from float64, and none is missing."""
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
