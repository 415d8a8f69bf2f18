"""Muon against a float64 reference that shares no code with it: it goes through singular values, not products."""

import copy

import numpy as np
import pytest
import torch

from lightlm.optim import orthogonal
from lightlm.optim.orthogonal import Muon, orthogonalize, polynomials
from tests.optim.built import optimizer_for
from tests.shapes import build

SHAPES = [(16, 16), (8, 24), (24, 8), (3, 12, 20), (2, 20, 12), (16, 16), (1, 9)]


def newton_schulz_float64(matrix, steps=5):
    """The quintic's odd polynomial acts only on the singular values: U p(...p(S)) V^T."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def reference(weight, gradients, *, lr, decay, momentum, nesterov, steps, original, cautious):
    """Muon in float64, one matrix, with sums for momentum as in Keller Jordan's first version."""
    out, width = weight.shape
    scale = max(1, out / width) ** 0.5 if original else 0.2 * max(out, width) ** 0.5
    buffer = np.zeros_like(weight)
    for gradient in gradients:
        buffer = momentum * buffer + gradient
        update = newton_schulz_float64(gradient + momentum * buffer if nesterov else buffer, steps)
        decayed = np.where(update * weight >= 0, weight, 0) if cautious else weight
        weight = weight - lr * decay * decayed - lr * scale * update
    return weight


def muon(
    parameters, lr=0.02, decay=0.1, dtype=torch.float32, momentum=0.95, method="newton_schulz", kind=Muon, **changes
):
    group = {"params": parameters, "lr": lr, "weight_decay": decay, "momentum": momentum}
    settings = {"nesterov": True, "scale_rule": "match_rms_adamw", "cautious": False} | changes
    others = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    return kind([group], others, dtype=dtype, steps=polynomials(method, 5), **settings)


def train(optimizer, parameters, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def random_run(shapes=SHAPES, steps=4, seed=0):
    """Parameters of these shapes and gradients for some steps; fp32 values that float64 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) * 1e-3 for shape in shapes] for _ in range(steps)]
    return weights, gradients


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("cautious", [True, False])
@pytest.mark.parametrize("call_elements", [1, 300, 2**20])
def test_muon_follows_its_float64_reference(nesterov, original, cautious, call_elements, monkeypatch):
    """Four steps in fp32: every matrix as in a call of its own; experts each by itself."""
    monkeypatch.setitem(orthogonal._CALL_ELEMENTS, "cpu", call_elements)
    weights, gradients = random_run()
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    rule = "original" if original else "match_rms_adamw"
    optimizer = muon(parameters, nesterov=nesterov, scale_rule=rule, cautious=cautious, momentum=0.9)
    train(optimizer, parameters, gradients)
    for index, (weight, parameter) in enumerate(zip(weights, parameters, strict=True)):
        matrices = weight.double().reshape(-1, *weight.shape[-2:]).numpy()
        for expert, matrix in enumerate(matrices):
            per_step = [g[index].double().reshape(matrices.shape).numpy()[expert] for g in gradients]
            expected = reference(
                matrix, per_step, lr=0.02, decay=0.1, momentum=0.9, nesterov=nesterov, steps=5, original=original,
                cautious=cautious,
            )  # fmt: skip
            got = parameter.detach().reshape(matrices.shape)[expert].double().numpy()
            np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=f"{tuple(weight.shape)}, {expert}")


def test_muon_agrees_with_torchs_own_on_2d_weights():
    weights, gradients = random_run([(16, 16), (8, 24), (24, 8)])
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    train(muon(ours, dtype=torch.bfloat16), ours, gradients)
    train(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs, gradients)
    for a, b, start in zip(ours, theirs, weights, strict=True):
        # Both round to 8 significant bits at every product, in another order.
        assert (a - b).norm() < 0.03 * (b - start).norm()


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 16, 48), (1, 64, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_land_in_newton_schulzs_band(shape, dtype):
    """0.68 to 1.20 for all that were above 0.2% of the norm."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    matrices = u @ torch.diag_embed(s.clamp(min=0.003 * s.norm(dim=-1, keepdim=True))) @ vt
    result = orthogonalize(matrices, polynomials("newton_schulz", 5), dtype)
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.float())
    assert 0.67 < values.min() < values.max() < 1.21
    # The singular vectors stay: U^T X V is diagonal.
    inner = u.mT @ result.float() @ vt.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < (1e-4 if dtype == torch.float32 else 0.05)


def test_an_update_has_the_size_of_an_adamw_update():
    """arXiv 2502.16982: a root mean square of about 0.2 per unit of learning rate, for any shape."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        train(muon([parameter], lr=1.0, decay=0.0), [parameter], random_run([shape], steps=1)[1])
        assert 0.14 < parameter.detach().square().mean().sqrt() < 0.24


def test_a_matrix_without_gradient_stays_and_a_zero_gradient_only_decays():
    idle, zero = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    zero.grad = torch.zeros(4, 4)
    muon([idle, zero], lr=0.5, decay=0.1).step()
    assert torch.equal(idle, torch.ones(4, 4))
    torch.testing.assert_close(zero.detach(), torch.full((4, 4), 0.95))


def test_blocks_matrices_get_muon_and_all_else_adamw():
    for shape in ("gpt2", "qwen3"):
        model = build(shape)
        optimizer = optimizer_for(model, name="muon", lr=1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for name, parameter in model.named_parameters():
            is_matrix = name.startswith("blocks.") and parameter.ndim >= 2
            expected = {"momentum_buffer"} if is_matrix else {"step", "exp_avg", "exp_avg_sq"}
            assert optimizer.state[parameter].keys() == expected, name


def test_state_survives_a_state_dict():
    """torch's own saving works too: it replaces groups and state, and both halves must follow."""
    model, other = build("qwen3"), build("qwen3")
    optimizer, fresh = (optimizer_for(m, name="muon", lr=1e-2) for m in (model, other))
    generator = torch.Generator().manual_seed(3)

    def step(both):
        for pair in zip(model.parameters(), other.parameters(), strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for parameter in pair:
                parameter.grad = gradient.clone()
        for one in both:
            one.step()

    step([optimizer])
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # loading shares tensors
    step([optimizer, fresh])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
