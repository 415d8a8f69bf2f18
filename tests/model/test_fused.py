"""The hand-written CPU path and the plain one compute the same, to the rounding of their precision."""

import copy

import pytest
import torch

from lightlm.model import fused, products
from lightlm.train.step import loss
from lightlm.train.step.loss import token_loss
from tests.shapes import SHAPES, build

# Seeded: the gradient of a key's bias is 0, so its rounding has nothing to be small beside.
INPUTS, TARGETS = torch.randint(97, (2, 3, 10), generator=torch.Generator().manual_seed(0)).unbind()


def gradients(model, *, dtype=None, plain=False):
    """Loss and gradients of one batch; `plain` takes the operations that other devices run."""
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(fused, "applies", lambda x: False)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            total = token_loss(model, INPUTS, TARGETS)
        (total / TARGETS.numel()).backward()
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    # The rounding error of one number is a matter of luck: compare the scales of all branches as one vector.
    scales = [found.pop(name) for name in list(found) if name.endswith("residual.scale")]
    return total.item(), found | ({"residual scales": torch.cat(scales)} if scales else {})


@pytest.mark.parametrize("name", SHAPES)
def test_fused_training_is_as_exact_as_plain_autocast(name):
    """Both paths' gradients are equally far from float64, and none is missing.

    Rounding may send a token to another expert, in either path and on some CPUs only. So with experts the median of
    several models counts.
    """
    found, differ = {}, False
    for seed in range(5) if SHAPES[name].num_experts else (0,):
        model = build(name, seed=seed)
        exact_loss, exact = gradients(copy.deepcopy(model).double())
        plain_loss, plain = gradients(copy.deepcopy(model), dtype=torch.bfloat16, plain=True)
        fused_loss, ours = gradients(model, dtype=torch.bfloat16)
        assert fused_loss == pytest.approx(exact_loss, rel=2e-3)
        assert plain_loss == pytest.approx(exact_loss, rel=2e-3)
        for key, expected in exact.items():
            errors = [(gradient[key] - expected).norm() for gradient in (ours, plain)]
            found.setdefault(key, []).append(torch.stack([*errors, expected.norm()]))
            differ = differ or not torch.equal(ours[key], plain[key])
    for key, values in found.items():
        our_error, plain_error, size = torch.stack(values).median(0).values
        assert our_error <= 1.5 * plain_error + (0.1 if key == "residual scales" else 0.01) * size, key
    assert differ, "the fused path did not run"


@pytest.mark.parametrize("slow_mkl", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_fused_training_in_fp32_is_as_exact_as_plain(name, slow_mkl, monkeypatch):
    if slow_mkl and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    for module in (products, loss):
        monkeypatch.setattr(module, "has_slow_mkl", lambda: slow_mkl)
    monkeypatch.setitem(loss._CHUNK, "cpu", 16)  # two chunks
    model = build(name)
    exact_loss, exact = gradients(copy.deepcopy(model).double())
    _, plain = gradients(copy.deepcopy(model), plain=True)
    fused_loss, ours = gradients(model)
    assert fused_loss == pytest.approx(exact_loss, rel=1e-6)
    for key, expected in exact.items():
        size = expected.norm()
        assert (ours[key] - expected).norm() <= 1.5 * (plain[key] - expected).norm() + 2e-6 * size, key
    assert any(not torch.equal(ours[key], plain[key]) for key in exact), "the fused path did not run"


def test_precisions_that_it_does_not_know_take_the_plain_operations():
    assert fused.applies(torch.ones(1))
    assert not fused.applies(torch.ones(1, dtype=torch.float64))
    assert not fused.applies(torch.ones(1, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.float16):
        assert not fused.applies(torch.ones(1))
    with torch.no_grad():
        assert not fused.applies(torch.ones(1))


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
