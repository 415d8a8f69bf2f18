"""NorMuon against a float64 reference written from arXiv 2510.05491, algorithm 1."""

import numpy as np
import pytest
import torch

from lightlm.optim import orthogonal
from lightlm.optim.muon import MuonSection
from lightlm.optim.normuon import NorMuonSection
from lightlm.optim.orthogonal import NorMuon
from tests.optim.built import optimizer_for
from tests.optim.test_muon import SHAPES, muon, newton_schulz_float64, random_run, train
from tests.shapes import build


def reference(weight, gradients, *, lr, decay, momentum, beta2):
    """One matrix (m, n): O is orthogonal, v per row, and the step 0.2 lr sqrt(m n) / |O / sqrt(v)| O / sqrt(v)."""
    mean, v = np.zeros_like(weight), np.zeros(len(weight))
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        update = newton_schulz_float64(mean)
        v = beta2 * v + (1 - beta2) * (update**2).mean(axis=1)
        update = update / np.sqrt(v)[:, None]
        step = 0.2 * lr * np.sqrt(weight.size) / np.linalg.norm(update)
        weight = weight - lr * decay * weight - step * update
    return weight


@pytest.mark.parametrize("call_elements", [1, 2**20])
def test_normuon_follows_its_float64_reference(call_elements, monkeypatch):
    """Tall, wide and square matrices, and experts each by itself: rows are output neurons in all of them."""
    monkeypatch.setitem(orthogonal._CALL_ELEMENTS, "cpu", call_elements)
    weights, gradients = random_run()
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = muon(parameters, nesterov=False, momentum=0.9, kind=NorMuon, beta2=0.8)
    train(optimizer, parameters, gradients)
    assert len(weights) == len(SHAPES)
    for index, (weight, parameter) in enumerate(zip(weights, parameters, strict=True)):
        matrices = weight.double().reshape(-1, *weight.shape[-2:]).numpy()
        for expert, matrix in enumerate(matrices):
            per_step = [g[index].double().reshape(matrices.shape).numpy()[expert] for g in gradients]
            expected = reference(matrix, per_step, lr=0.02, decay=0.1, momentum=0.9, beta2=0.8)
            got = parameter.detach().reshape(matrices.shape)[expert].double().numpy()
            np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=f"{tuple(weight.shape)}, {expert}")


@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (3, 16, 16)])
def test_an_update_has_the_size_of_an_orthogonal_one_and_its_neurons_are_alike(rule, shape):
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer = muon([parameter], lr=1.0, decay=0.0, scale_rule=rule, kind=NorMuon, beta2=0.95)
    train(optimizer, [parameter], random_run([shape], steps=1)[1])
    update = parameter.detach()
    rows, columns = shape[-2:]
    size = 0.2 if rule == "match_rms_adamw" else max(1, rows / columns) ** 0.5 / max(rows, columns) ** 0.5
    torch.testing.assert_close(update.square().mean(dim=(-2, -1)).sqrt(), torch.full(shape[:-2], size))
    # In the first step, the running mean is a multiple of the row's own mean square.
    torch.testing.assert_close(update.square().mean(dim=-1).sqrt(), torch.full(shape[:-1], size))


def test_a_zero_gradient_only_decays():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    muon([parameter], lr=0.5, decay=0.1, kind=NorMuon, beta2=0.95).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))


def test_its_state_is_muons_and_one_number_per_row():
    model = build("moe")
    optimizer = optimizer_for(model, name="normuon", lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    section, muons = NorMuonSection(lr=1e-3), MuonSection(lr=1e-3)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            counted = section.state_bytes(group["name"], tuple(parameter.shape))
            assert sum(4 * value.numel() for key, value in state.items() if key != "step") == counted
            if group["name"] == "matrices":
                assert state["second_moment"].shape == (*parameter.shape[:-1], 1)
                assert counted > muons.state_bytes(group["name"], tuple(parameter.shape))
