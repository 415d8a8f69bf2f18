"""The average of weights against its definition in float64."""

from decimal import Decimal
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightlm.train.step.averaging import WeightAverage, share_of_newest
from tests.shapes import build

BATCHES = (256, 256, 512, 1024, 100_000, 64)


def shares(batches, half_life):
    """Each step's share: (1 - 2^(-batch / H)) 2^(-later tokens / H), scaled to a sum of 1."""
    left = [Decimal("0.5") ** (Decimal(batch) / half_life) for batch in batches]
    sizes = [(1 - own) * prod(left[index + 1 :]) for index, own in enumerate(left)]
    return np.array([float(size / sum(sizes)) for size in sizes])


@pytest.mark.parametrize("half_life", [1, 300, 10**12])
def test_shares_are_those_of_the_definition(half_life):
    found, seen = [], 0
    for batch in BATCHES:
        seen += batch
        newest = share_of_newest(batch, seen, half_life)
        found = [share * (1 - newest) for share in found] + [newest]
    np.testing.assert_allclose(found, shares(BATCHES, half_life), rtol=1e-9, atol=1e-15)


def averaged(model, half_life, batches, began=0):
    """The average after random steps, and the weights after each step, by name."""
    seen: list = []
    average = WeightAverage(SimpleNamespace(model=model, forget_gathered_weights=lambda: None), half_life, began)
    tokens = began
    for batch in batches:
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(torch.randn_like(tensor))
        tokens += batch
        average.update(tokens, batch)
        seen.append({name: tensor.double().clone() for name, tensor in model.state_dict().items()})
    return average, seen


@pytest.mark.parametrize("began", [0, 10**9])
def test_the_average_of_parameters_and_selection_biases(began):
    model = build("moe")
    average, seen = averaged(model, 700, BATCHES, began)
    state = average.state()
    assert state.keys() == model.state_dict().keys()
    assert any("selection_bias" in name for name in state)
    for name, tensor in state.items():
        expected = sum(s * weights[name] for s, weights in zip(shares(BATCHES, 700), seen, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)


def test_before_the_first_step_the_average_is_the_weights():
    model = build("llama")
    average, _ = averaged(model, 700, ())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in average.state().items())
    with torch.no_grad():
        model.embed_tokens.weight.add_(1)
    assert not torch.equal(average.state()["embed_tokens.weight"], model.embed_tokens.weight)


def test_batches_of_another_size_give_the_same_decay():
    """Over weights that do not move: a batch of 1,024 decays like four of 256."""
    four = np.add.reduceat(shares([256] * 8, 500), [0, 4])
    np.testing.assert_allclose(shares([1024, 1024], 500), four, rtol=1e-12)


def test_the_average_takes_the_weights_place_and_gives_it_back():
    model = build("llama")
    average, seen = averaged(model, 700, BATCHES)
    expected = {name: tensor.clone() for name, tensor in average.state().items()}
    with average.in_place():
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor.double(), seen[-1][name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in average.state().items())
