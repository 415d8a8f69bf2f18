"""Hand-written gradients for training on a CPU, in fp32 or in bf16 autocast.

Each function computes what the plain operations in `norms.py`, `attention.py` and `mlp.py` compute, to rounding, in
fewer passes over memory. Under autocast, norms and activations return bf16, where plain ones cast fp32 once for every
product. Layers that share an input become one product. What is cheap to recompute is not saved. Parameters stay
separate; only copies of them are joined. Products in fp32 take the faster of torch's two libraries (`products.py`).
benchmarks/train.py measures the gain.

Shapes: B batch, T positions, N = B T tokens, D features in, F features out, H query heads, G key/value heads, K head
size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightlm.model.products import product
from lightlm.model.scaling import Linear, Scaled

_PIECE = 1 << 18  # elements that `add_` adds at a time: 1 MB in fp32

_copies: dict[tuple[int, ...], Tensor] | None = None


def applies(x: Tensor) -> bool:
    """Return whether x is in a pass with gradients on a CPU, in fp32 or under bf16 autocast.

    Not inside torch.compile, which fuses the plain operations itself.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.float32


def precision() -> torch.dtype:
    """Return the precision of products where `applies`."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


@contextmanager
def kept_weight_copies() -> Iterator[None]:
    """Context manager that reuses copies of weights across micro-batches. No weight may change inside it."""
    global _copies
    _copies = {}
    try:
        yield
    finally:
        _copies = None


@torch.no_grad()
def joined_copy(parts: Sequence[Scaled], dim: int = 0) -> Tensor:
    """Return a copy of weights times multipliers in the precision of products, joined along a dimension.

    A single plain weight in that precision is not copied.
    """
    weights = [part.weight for part in parts]
    if len(parts) == 1 and parts[0].is_plain and precision() == weights[0].dtype:
        return weights[0].detach()
    key = tuple(id(tensor) for part in parts for tensor in part)
    if _copies is not None and key in _copies:
        return _copies[key]
    sizes = [weight.shape[dim] for weight in weights]
    shape = [*weights[0].shape[:dim], sum(sizes), *weights[0].shape[dim + 1 :]]
    copy = torch.empty(shape, dtype=precision())
    for place, part in zip(copy.split(sizes, dim), parts, strict=True):
        place.copy_(part.product())
    if _copies is not None:
        _copies[key] = copy
    return copy


def add_(total: Tensor, part: Tensor, *, first: bool = False) -> None:
    """Add a matrix of lower precision to an fp32 sum, in place; with `first`, overwrite the sum.

    torch would first copy all of `part` to fp32. On a CPU the copy is made in pieces that stay in its caches.
    """
    if first:
        total.copy_(part)
        return
    rows = max(_PIECE // part.shape[1], 1) if part.device.type == "cpu" else len(part)
    for start in range(0, len(part), rows):
        total[start : start + rows] += part[start : start + rows]


def linear(x: Tensor, *layers: Linear) -> Tensor:
    """Return the joined outputs (..., F1 + F2 + ...) of layers that share the input x (..., D)."""
    weights = [layer.scaled() for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias_F = joined_copy([Scaled(bias) for bias in biases]) if biases else None
    return _Linear.apply(x, joined_copy(weights), bias_F, *(weight.receiver() for weight in weights), *biases)


class _Linear(torch.autograd.Function):
    """x W^T + b from copies of the weights. `parameters` are passed only to receive the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, *parameters: Tensor) -> Tensor:
        x_ND = x.to(weight_FD.dtype).flatten(0, -2)
        out_NF = product(x_ND, weight_FD.T, bias_F)
        ctx.save_for_backward(x_ND, weight_FD)
        ctx.weight_rows = [len(parameter) for parameter in parameters if parameter.ndim == 2]
        ctx.has_bias = bias_F is not None
        return out_NF.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_FD = ctx.saved_tensors
        grad_NF = grad.flatten(0, -2)
        grad_x = product(grad_NF, weight_FD).view(*grad.shape[:-1], -1)
        grad_biases: tuple[Tensor, ...] = ()
        if ctx.has_bias:
            grad_biases = torch.mv(grad_NF.T, grad_NF.new_ones(len(grad_NF))).float().split(ctx.weight_rows)
        return grad_x, None, None, *product(grad_NF.T, x_ND).float().split(ctx.weight_rows), *grad_biases


class RMSNormFunction(torch.autograd.Function):
    """x (..., D) of any precision -> x / sqrt(mean(x^2) + eps) * weight in that of products, computed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        full = x.float()
        scale = _inverse_rms(full, eps)
        weight_D = weight_D.float()  # bf16 where FSDP gathers it
        ctx.save_for_backward(x, weight_D, scale)
        return (full * scale).mul_(weight_D).to(precision())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        normed_ND = (x * scale).flatten(0, -2)
        grad_ND = grad.float().flatten(0, -2)
        product_ND = grad_ND * normed_ND
        mean_N1 = (product_ND @ (weight_D / len(weight_D)))[:, None]
        grad_x = (grad_ND * weight_D).addcmul_(normed_ND, mean_N1, value=-1).mul_(scale.flatten(0, -2))
        return grad_x.view_as(x).to(x.dtype), product_ND.sum(0), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) of fp32 x (..., K) over its last dimension: (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class ScaledSumFunction(torch.autograd.Function):
    """x + scale * y, of fp32 x, y of any precision and a scale with one element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale)
        return torch.add(x, y, alpha=scale.item())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, scale = ctx.saved_tensors
        grad_y = torch.mul(grad, scale.item(), out=torch.empty_like(y))
        grad_scale = torch.dot(grad.flatten(), y.to(grad.dtype).flatten())
        return grad, grad_y, grad_scale.to(scale.dtype)[None]


class SwiGLUFunction(torch.autograd.Function):
    """Joined gate and up (..., 2F) -> silu(gate) * up (..., F)."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        ctx.save_for_backward(both)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_both


class GateFunction(torch.autograd.Function):
    """y * sigmoid(gate), of y and a gate of one shape."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, gate)
        return gate.sigmoid().mul_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, gate = ctx.saved_tensors
        opened = gate.sigmoid()
        return grad * opened, torch.ops.aten.sigmoid_backward(grad * y, opened)


class HeadsFunction(torch.autograd.Function):
    """Joined projections (B, T, (H + 2G) K) -> queries (B, T, H, K), keys and values (B, T, G, K).

    With `num_gates`, as many heads more follow and are a fourth result. Queries and keys are normalized if weights are
    given, and rotated if cos and sin (B or 1, T, K) are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        joined: Tensor,
        num_heads: int,
        num_kv_heads: int,
        num_gates: int,
        norm_eps: float,
        *optional: Tensor | None,
    ) -> tuple[Tensor, ...]:
        q_weight_K, k_weight_K, cos, sin = optional
        heads = joined.unflatten(-1, (num_heads + 2 * num_kv_heads + num_gates, -1))
        qk, v, gate = heads.split((num_heads + num_kv_heads, num_kv_heads, num_gates), dim=2)
        scale = weight_HK = None
        if q_weight_K is not None and k_weight_K is not None:
            weight_HK = torch.cat((q_weight_K.expand(num_heads, -1), k_weight_K.expand(num_kv_heads, -1))).float()
            qk = qk.float()
            scale = _inverse_rms(qk, norm_eps)
            qk = (qk * scale).mul_(weight_HK)
        if cos is not None and sin is not None:
            qk = _rotate(qk, cos, sin, 1)
        qk = qk.to(joined.dtype)
        ctx.save_for_backward(joined if scale is not None else None, scale, weight_HK, cos, sin)
        ctx.num_heads = num_heads
        q, k = qk.split((num_heads, num_kv_heads), dim=2)
        return (q, k, v, gate) if num_gates else (q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined, scale, weight_HK, cos, sin = ctx.saved_tensors
        grad_heads = torch.cat(grads, dim=2)
        grad_qk = grad_heads[:, :, : grads[0].shape[2] + grads[1].shape[2]]
        grad_weights: tuple[Tensor | None, Tensor | None] = (None, None)
        turned = grad_qk if cos is None else _rotate(grad_qk, cos, sin, -1)
        if scale is not None:
            normed = joined.view_as(grad_heads)[:, :, : grad_qk.shape[2]] * scale
            turned = turned.float()
            product = turned * normed
            grad_weight_HK = product.flatten(0, 1).sum(0)
            grad_weights = grad_weight_HK[: ctx.num_heads].sum(0), grad_weight_HK[ctx.num_heads :].sum(0)
            mean = product.mul_(weight_HK).mean(-1, keepdim=True)
            turned = turned.mul_(weight_HK).addcmul_(normed, mean, value=-1).mul_(scale)
        if turned is not grad_qk:
            grad_qk.copy_(turned)
        return grad_heads.flatten(2), None, None, None, None, *grad_weights, None, None


def _rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotate by the angle (direction 1) or back (-1), as `rotary.rotate` does, without copies of the halves."""
    half = x_BTHK.shape[-1] // 2
    first, second = x_BTHK[..., :half], x_BTHK[..., half:]
    cos, sin = (part[:, :, None, :half].to(x_BTHK.dtype) for part in (cos, sin))
    out = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=direction)
    return out
