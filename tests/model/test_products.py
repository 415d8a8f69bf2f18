"""Products by any library equal torch's."""

import pytest
import torch

from lightlm.model import products


@pytest.mark.parametrize("sizes", [(0, 8, 8), (8, 0, 8), (8, 8, 0), (1, 1, 1), (16, 16, 16), (40, 1, 40), (33, 48, 17)])
@pytest.mark.parametrize("slow_mkl", [False, True])
def test_products_of_any_size_and_layout(sizes, slow_mkl, monkeypatch):
    monkeypatch.setattr(products, "has_slow_mkl", lambda: slow_mkl)
    rows, inner, columns = sizes
    a, b, bias = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(columns)
    wide = torch.randn(inner, columns + 5)
    for left, right in ((a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T), (a, wide[:, 5:])):
        torch.testing.assert_close(products.product(left, right), left @ right, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(products.product(left, right, bias), left @ right + bias, atol=1e-5, rtol=1e-5)
    pairs = torch.stack([a, a]), torch.stack([b, 2 * b])
    torch.testing.assert_close(products.batched_product(*pairs), torch.bmm(*pairs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 16), (3, 40), (97, 33), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packs", [False, True])
def test_prepared_weights_multiply_as_plain_ones(sizes, dtype, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(products, "packs", lambda *_: False)
    weight_FD, bias_F = torch.randn(sizes).to(dtype), torch.randn(sizes[0]).to(dtype)
    for rows in (1, 3, 8, 20):
        x_ND = torch.randn(rows, sizes[1]).to(dtype)
        expected_NF = x_ND.double() @ weight_FD.double().T
        accuracy = {"atol": 99 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(products.prepared(weight_FD)(x_ND).double(), expected_NF, **accuracy)
        found_NF = products.prepared(weight_FD, bias_F)(x_ND).double()
        torch.testing.assert_close(found_NF, expected_NF + bias_F.double(), **accuracy)


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("columns", [96, 24, 17])
def test_quantized_weights_are_rounded_to_255_steps_per_output(columns, rows, operator, monkeypatch):
    if not operator:
        monkeypatch.setattr(products, "has_int8_product", lambda _: False)
    weight_FD, bias_F = torch.randn(65, columns) * torch.logspace(-3, 3, 65)[:, None], torch.randn(65)
    weight_FD[5] = 0
    x_ND = torch.randn(rows, columns).bfloat16()
    found_NF = products.quantized(weight_FD, bias_F)(x_ND).double()
    # A weight is off by half a step at most, of which a row's largest number has 127; the scale is rounded up to bf16.
    step_F = weight_FD.double().abs().amax(1) / 127 * (1 + 2**-7)
    expected_NF = x_ND.double() @ weight_FD.double().T + bias_F
    rounding_NF = 2**-7 * (expected_NF.abs() + bias_F.abs() + x_ND.double().abs() @ weight_FD.double().abs().T / 16)
    assert ((found_NF - expected_NF).abs() <= x_ND.double().abs().sum(1)[:, None] * step_F / 2 + rounding_NF).all()
    # Over many weights such errors cancel: an error of a uniform distribution has a spread of 1 / sqrt(12).
    expected_error_NF = x_ND.double().norm(dim=1)[:, None] * step_F / 12**0.5
    assert (found_NF - expected_NF).norm(dim=0)[20:].le(3 * (expected_error_NF + rounding_NF).norm(dim=0)[20:]).all()
