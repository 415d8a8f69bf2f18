"""Logits in fp32 from operands of lower precision: a bf16 logit of 20 is a multiple of 0.125."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def fp32_logits(x_ND: Tensor, weight_CD: Tensor) -> Tensor:
    """Return x W^T (N, C) in fp32, computed on each device's fast unit for the operands' precision."""
    if x_ND.dtype == torch.float32:
        return F.linear(x_ND, weight_CD)
    if x_ND.device.type == "cuda":
        return torch.mm(x_ND, weight_CD.T, out_dtype=torch.float32)
    if x_ND.device.type == "cpu" and x_ND.dtype == torch.bfloat16:
        with _fp32_rounded_to_bf16():
            return F.linear(x_ND.float(), weight_CD.float())
    return F.linear(x_ND, weight_CD).float()


@contextmanager
def _fp32_rounded_to_bf16() -> Iterator[None]:
    """Let a CPU's bf16 units take fp32 operands, which is exact for operands converted from bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
