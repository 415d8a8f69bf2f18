"""Polar Express against a linear program, and its effect on singular values against numpy's SVD."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from lightlm.optim.orthogonal import orthogonalize, polynomials
from lightlm.optim.polar_express import best_quintic, quintics


def composed(x, steps):
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    return x


def least_error(lower, upper):
    """The least max |p(x) - 1| of an odd quintic, as a linear program over 2,001 points of the interval."""
    x = np.linspace(lower, upper, 2001)
    powers = np.stack([x, x**3, x**5], axis=1)
    error = np.ones((len(x), 1))
    above, below = np.hstack([powers, -error]), np.hstack([-powers, -error])
    limits = np.concatenate([np.ones(len(x)), -np.ones(len(x))])
    found = linprog([0, 0, 0, 1], np.vstack([above, below]), limits, bounds=[(None, None)] * 3 + [(0, None)])
    return found.fun


@pytest.mark.parametrize(("lower", "upper"), [(0.024, 1.0), (0.1, 1.0), (0.3, 1.7), (0.8, 1.2), (1.5, 1.9)])
def test_no_odd_quintic_is_nearer_to_1(lower, upper):
    x = np.linspace(lower, upper, 2001)
    error = np.abs(composed(x, [best_quintic(lower, upper)]) - 1).max()
    assert error == pytest.approx(least_error(lower, upper), rel=1e-4, abs=1e-9)


def test_the_coefficients_are_those_of_the_paper():
    """The first row of its table, before the safety factor of 1.01. Its cushion has more digits than 0.024."""
    a, b, c = quintics(5)[0]
    assert (a * 1.01, b * 1.01**3, c * 1.01**5) == pytest.approx((8.288, -23.60, 17.30), rel=1e-3)


@pytest.mark.parametrize("steps", [4, 5, 6, 10, 20])
def test_more_steps_converge_to_1_and_none_diverges(steps):
    """Also values that rounding lifted 1% above the norm."""
    error = np.abs(composed(np.geomspace(1e-3, 1.01, 20001), quintics(steps)) - 1).max()
    assert error < {4: 0.6, 5: 0.15, 6: 0.01}.get(steps, 1e-9)
    assert np.abs(composed(np.geomspace(1e-9, 1e-3, 1001), quintics(steps))).max() < 1.01 + error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 16, 48), (1, 64, 80)])
def test_singular_values_land_in_the_predicted_interval(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.linalg.qr(torch.randn(shape[0], n, n, generator=generator))[0] for n in shape[1:]]
    rows = shape[1]
    values = torch.logspace(-2.9, 0, rows).flip(0)  # down to 0.13% of the largest
    values = values / values.norm()
    values = values.clamp(min=1e-3)
    matrices = vectors[0] * values @ vectors[1][:, :rows]
    result = orthogonalize(matrices, polynomials("polar_express", 5), dtype)
    assert result.dtype == dtype
    found = np.linalg.svd(result.float().numpy(), compute_uv=False)
    predicted = composed(np.geomspace(1e-3, 1.0, 20001), quintics(5))
    slack = 1e-4 if dtype == torch.float32 else 0.1  # 0.1% of the norm is below the rounding of bf16
    assert predicted.min() - slack < found.min() < found.max() < predicted.max() + slack
    assert (predicted.min(), predicted.max()) == pytest.approx((0.852, 1.124), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_nearer_to_the_polar_factor_than_newton_schulz(dtype):
    """Mean distance from U V^T of numpy's SVD, for random matrices."""
    matrices = torch.randn(8, 48, 64, generator=torch.Generator().manual_seed(2))
    u, _, vt = np.linalg.svd(matrices.double().numpy(), full_matrices=False)
    distances = {
        method: np.linalg.norm(orthogonalize(matrices, polynomials(method, 5), dtype).double().numpy() - u @ vt)
        for method in ("newton_schulz", "polar_express")
    }
    assert distances["polar_express"] < 0.5 * distances["newton_schulz"]
