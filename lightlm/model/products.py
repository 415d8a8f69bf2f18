"""Matrix products by the fastest library that this machine has.

`product` is for many rows. `prepared` weights are for few rows, as in decoding, where a product takes the time of
reading the weight: oneDNN then keeps it in blocks that a core reads in sequence.

Shapes: N, K, M of a product (N, K) x (K, M); E pairs of matrices; F features out, D features in.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ONEDNN_SIZE = 16  # least rows and columns: one register; oneDNN refuses empty matrices
_PACKED_ROWS = 8  # rows that oneDNN packs weights for. By benchmarks/decoding.py, such a layout suits 1 to 512 rows.

Product = Callable[[Tensor], Tensor]  # x (N, D) -> (N, F)


@functools.cache
def has_slow_mkl() -> bool:
    """Return whether fp32 products are faster in oneDNN than in MKL, which is torch's choice.

    MKL has AVX-512 code only for Intel. On one core of a Zen 5, it reaches 110 GFLOP/s and oneDNN 240
    (docs/decisions/fused-cpu-layers.md). The answer follows from the machine and not from a measurement, so that a run
    is repeatable.
    """
    name = str(torch.cpu.get_capabilities().get("cpu_name", ""))
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and name.startswith("AMD") and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _takes_onednn(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and has_slow_mkl()


def product(a_NK: Tensor, b_KM: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Return a b + bias, a new (N, M) tensor, without a graph. Views such as transposes are not copied."""
    if _takes_onednn(a_NK) and min(*a_NK.shape, b_KM.shape[1]) >= _ONEDNN_SIZE:
        # torch.compile's own name for oneDNN's product; it takes (M, K).
        linear: Tensor = torch.ops.mkldnn._linear_pointwise(a_NK, b_KM.T, bias_M, "none", [], "")
        return linear
    return torch.mm(a_NK, b_KM) if bias_M is None else torch.addmm(bias_M, a_NK, b_KM)


def batched_product(a_ENK: Tensor, b_EKM: Tensor, out_ENM: Tensor | None = None) -> Tensor:
    """Return the products of E pairs of matrices (E, N, M), as `product` does for one."""
    if not _takes_onednn(a_ENK):
        return torch.bmm(a_ENK, b_EKM) if out_ENM is None else torch.bmm(a_ENK, b_EKM, out=out_ENM)
    if out_ENM is None:
        out_ENM = a_ENK.new_empty(len(a_ENK), a_ENK.shape[1], b_EKM.shape[2])
    for a_NK, b_KM, out_NM in zip(a_ENK, b_EKM, out_ENM, strict=True):
        out_NM.copy_(product(a_NK, b_KM))
    return out_ENM


@functools.cache
def packs(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs weights of this precision here, and has fast code for it.

    AVX-512 or Arm's bf16 instructions decide for bf16, where a packed product reads memory twice as fast as a plain one
    (AMD EPYC, Zen 5: 36 against 17 GB/s with two threads).
    """
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepared(weight_FD: Tensor, bias_F: Tensor | None = None) -> Product:
    """Return a function that computes x W^T + b for few rows x (N, D) in the weight's precision.

    It holds a copy of the weight if oneDNN packs it.
    """
    if not packs(weight_FD.device.type, weight_FD.dtype) or min(weight_FD.shape) < _ONEDNN_SIZE:
        return functools.partial(F.linear, weight=weight_FD, bias=bias_F)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_FD, _PACKED_ROWS)
    linear = torch.ops.mkldnn._linear_pointwise.default

    def run(x_ND: Tensor) -> Tensor:
        out_NF: Tensor = linear(x_ND, packed, bias_F, "none", [], "")
        return out_NF

    return run


_INT8_ROWS = 16  # above so many rows, multiplying by a weight that is turned back to floats is faster
# torch's int8 product reads whole vectors and past the end of rows of other lengths: some crash, all are wrong.
_INT8_COLUMNS = 32


@dataclass(frozen=True)
class Weights:
    """A matrix as it lies in memory. Called with x (N, D), it returns x W^T + b, in the precision of x.

    Args:
        numbers_FD: the matrix, or whole numbers in int8.
        scale_F: bf16; what the numbers of each row are multiplied by.
    """

    numbers_FD: Tensor
    bias_F: Tensor | None = None
    scale_F: Tensor | None = None

    def __call__(self, x_ND: Tensor) -> Tensor:
        numbers_FD, scale_F, bias_F = self.numbers_FD, self.scale_F, self.bias_F
        if scale_F is None:
            return product(x_ND, numbers_FD.T, bias_F)
        if len(x_ND) <= _INT8_ROWS and has_int8_product(numbers_FD):
            out_NF: Tensor = torch.ops.aten._weight_int8pack_mm.default(x_ND, numbers_FD, scale_F)
        else:
            dtype = torch.bfloat16 if packs("cpu", torch.bfloat16) else torch.float32
            out_NF = product(x_ND.to(dtype), self.floats(dtype).T).to(x_ND.dtype)
        return out_NF if bias_F is None else out_NF.add_(bias_F)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (F, D) as floats."""
        floats_FD = self.numbers_FD.to(dtype)
        return floats_FD if self.scale_F is None else floats_FD.mul_(self.scale_F.to(dtype)[:, None])


def rounded(weight_FD: Tensor, bias_F: Tensor | None = None) -> Weights:
    """Return a weight rounded to int8, one scale per output: whole numbers from -127 to 127 times a bf16 number."""
    weight_FD = weight_FD.float()
    # Rounded up to bf16, so that no number exceeds 127.
    scale_F = (weight_FD.abs().amax(1) / 127).mul_(1 + 2**-8).bfloat16()
    safe_F1 = torch.where(scale_F == 0, 1, scale_F).float()[:, None]
    numbers_FD = (weight_FD / safe_F1).round_().to(torch.int8)
    return Weights(numbers_FD, None if bias_F is None else bias_F.bfloat16(), scale_F)


def quantized(weight_FD: Tensor, bias_F: Tensor | None = None) -> Product:
    """Return a function that computes x W^T + b in bf16, with the weight rounded to int8."""
    weights = rounded(weight_FD, bias_F)
    if has_int8_product(weights.numbers_FD):
        return weights
    return prepared(weights.floats(torch.float32).bfloat16(), weights.bias_F)


def has_int8_product(numbers_FD: Tensor) -> bool:
    """Return whether torch has a product of such a matrix and few rows."""
    if numbers_FD.shape[1] % _INT8_COLUMNS != 0:
        return False
    return numbers_FD.device.type == "cpu" and hasattr(torch.ops.aten, "_weight_int8pack_mm")
