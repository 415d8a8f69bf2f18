"""The routed experts of a layer as stacked weights, and three ways to compute them that agree to rounding.

- grouped: `torch.nn.functional.grouped_mm` over tokens sorted by expert, on GPUs that take it. One kernel computes it
  at compute capability 9.0; at 8.x torch loops over the experts. On CPUs it is a loop for which oneDNN builds a kernel
  per load: three times as slow as padding.
- padded: one batched product over equally many tokens of each expert, then one product per expert for its remaining
  tokens; on all other devices. benchmarks/experts.py times them.
- single: one product for each expert that got a token; for decoding, where tokens are too few for a batch.

None of them drops a token. `torch.export` traces a fourth way, which computes every expert for every token.

Shapes: N tokens, K experts of a token, E experts, D hidden size, F intermediate size, R rows: tokens in the experts'
order, one for each choice, with padding; C rows of each expert in a batched product.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightlm.model import fused
from lightlm.model.config import ModelConfig
from lightlm.model.products import batched_product
from lightlm.model.scaling import COLUMNS, ROWS, Scaled, multiplier_shapes

# Which quantile of the experts' loads (tokens per expert) the batched product covers. A larger one pads more rows, a
# smaller one leaves more rows to one product per expert. By benchmarks/experts.py 0.3 is as fast, 0.75 and 0.99 slower.
_BATCHED_QUANTILE = 0.5
# Row counts are multiples of the mean load / 8, and of the 16 rows in a tile of a CPU's matrix unit: oneDNN builds a
# kernel for each new shape, which takes longer than a small product.
_UNITS_PER_EXPERT, _ROW_MULTIPLE = 8, 16
_SINGLE_ROWS = 4  # with fewer rows per expert on average, one product per expert is faster


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """E networks down(silu(gate(x)) * up(x)) without biases (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(shape))
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape).mT.contiguous())
        for name in PROJECTIONS:
            for kind, size in multiplier_shapes(config, *getattr(self, name).shape).items():
                self.register_parameter(f"{name}_{kind}", nn.Parameter(torch.ones(size)))

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return (N, D): for each token, the sum over its experts of weight times output.

        Args:
            ids_NK: the experts of each token, all different.
            weights_NK: their weights, fp32.
        """
        if torch.compiler.is_exporting():
            return self._every(x_ND, ids_NK, weights_NK)
        if _has_grouped_mm(x_ND, self.gate_proj):
            return self._grouped(x_ND, ids_NK, weights_NK)
        if not torch.is_grad_enabled() and ids_NK.numel() < _SINGLE_ROWS * len(self.gate_proj):
            return self._single(x_ND, ids_NK, weights_NK)
        return self._padded(x_ND, ids_NK, weights_NK)

    def scaled(self) -> list[Scaled]:
        """Return the weights of gate, up and down with their multipliers."""
        parts = [[getattr(self, f"{name}_{kind}", None) for kind in (ROWS, COLUMNS)] for name in PROJECTIONS]
        return [Scaled(getattr(self, name), *factors) for name, factors in zip(PROJECTIONS, parts, strict=True)]

    def _every(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Compute every expert for every token. The other ways read the loads, which `torch.export` cannot know."""
        gate_EDF, up_EDF, down_EFD = (part.product().to(x_ND.dtype).mT for part in self.scaled())
        y_END = (F.silu(x_ND @ gate_EDF) * (x_ND @ up_EDF)) @ down_EFD
        weights_NE = weights_NK.new_zeros(x_ND.shape[0], gate_EDF.shape[0]).scatter(1, ids_NK, weights_NK)
        return torch.einsum("end,ne->nd", y_END, weights_NE.to(y_END.dtype))

    def _grouped(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        dtype, choices = compute_dtype(x_ND), ids_NK.shape[1]
        order_R = ids_NK.flatten().argsort(stable=True)
        experts_E = torch.arange(len(self.gate_proj), device=ids_NK.device)
        ends_E = torch.searchsorted(ids_NK.flatten()[order_R], experts_E, right=True).to(torch.int32)
        x_RD = _Move.apply(x_ND.to(dtype), order_R, choices, True)
        gate_EDF, up_EDF, down_EFD = (part.product().to(dtype).mT for part in self.scaled())
        gate_RF = F.grouped_mm(x_RD, gate_EDF, offs=ends_E)
        up_RF = F.grouped_mm(x_RD, up_EDF, offs=ends_E)
        h_RF = F.silu(gate_RF) * up_RF * weights_NK.flatten()[order_R].to(dtype)[:, None]
        return _Move.apply(F.grouped_mm(h_RF, down_EFD, offs=ends_E), order_R, choices, False)

    def _padded(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        parts = self.scaled()
        if fused.applies(x_ND):
            both_E2FD = fused.joined_copy(parts[:2], dim=1)
            down_EDF = fused.joined_copy(parts[2:])
        else:
            with torch.no_grad():
                both_E2FD = torch.cat([part.product() for part in parts[:2]], dim=1).to(compute_dtype(x_ND))
                down_EDF = parts[2].product().to(both_E2FD.dtype)
        rows = _Rows.of(ids_NK, len(self.gate_proj))
        receivers = [part.receiver() for part in parts]
        return _PaddedExperts.apply(x_ND.to(both_E2FD.dtype), weights_NK, both_E2FD, down_EDF, rows, *receivers)

    def _single(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        dtype, choices = compute_dtype(x_ND), ids_NK.shape[1]
        order_R = ids_NK.flatten().argsort(stable=True)
        x_RD = x_ND.to(dtype).index_select(0, order_R // choices)
        y_RD, parts = torch.empty_like(x_RD), self.scaled()
        stop = 0
        for expert, rows in itertools.groupby(sorted(ids_NK.flatten().tolist())):
            start, stop = stop, stop + len(list(rows))
            x = x_RD[start:stop]
            gate, up, down = (part.each(lambda stack: stack[expert].to(dtype)) for part in parts)  # noqa: B023
            y_RD[start:stop] = down.linear(F.silu(gate.linear(x)).mul_(up.linear(x)))
        y_RD *= weights_NK.flatten()[order_R, None].to(dtype)
        return _sum_choices(y_RD, order_R, choices)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of products with a tensor: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _has_grouped_mm(x_ND: Tensor, weight_EFD: Tensor) -> bool:
    """Return whether CUDA takes it: it needs bf16, compute capability 8.0 and rows of whole 16 bytes."""
    return (
        x_ND.device.type == "cuda"
        and compute_dtype(x_ND) == torch.bfloat16
        and all(size % 8 == 0 for size in weight_EFD.shape[1:])
        and (torch.compiler.is_compiling() or torch.cuda.get_device_capability(x_ND.device) >= (8, 0))
    )


@functools.cache
def keep_padding_uncompiled() -> None:
    """Exclude `_padded` from torch.compile, because its shapes depend on its data."""
    Experts._padded = torch.compiler.disable(Experts._padded)  # type: ignore[method-assign]


class _Move(torch.autograd.Function):
    """Repeat rows (N, D) for each of their K choices, in the given order; or sum rows (R, D) over each token's choices.

    Each is the gradient of the other. Sums have a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_R: Tensor, choices: int, repeats: bool) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.choices, ctx.repeats = choices, repeats
        return rows.index_select(0, order_R // choices) if repeats else _sum_choices(rows, order_R, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order_R,), choices = ctx.saved_tensors, ctx.choices
        rows = _sum_choices(grad, order_R, choices) if ctx.repeats else grad.index_select(0, order_R // choices)
        return rows, None, None, None


def _sum_choices(rows_RD: Tensor, order_R: Tensor, choices: int) -> Tensor:
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return rows_RD.index_select(0, place_R).view(-1, choices, rows_RD.shape[1]).sum(1)


@dataclass(frozen=True)
class _Rows:
    """The row of each choice: first C rows for each expert, then the remaining rows, expert by expert."""

    pair_R: Tensor  # the choice (n K + k) of a row; N K for padding
    token_R: Tensor  # the token of a row; arbitrary for padding, whose weight is 0
    row_NK: Tensor  # the row of each choice
    batched: int  # C
    beyond: list[tuple[int, int, int]]  # (expert, first row, end) of the remaining rows

    @staticmethod
    @torch.no_grad()
    def of(ids_NK: Tensor, num_experts: int) -> "_Rows":
        """Build the rows of a batch. Waits for the device once, for the loads."""
        num_pairs = ids_NK.numel()
        order_P = ids_NK.flatten().argsort(stable=True)
        load_E = torch.bincount(ids_NK.flatten(), minlength=num_experts)
        loads = load_E.tolist()
        unit = _round_up(num_pairs // (num_experts * _UNITS_PER_EXPERT) or 1, _ROW_MULTIPLE)
        batched = _round_up(sorted(loads)[int(_BATCHED_QUANTILE * num_experts)], unit)
        beyond, begins, end = [], [], num_experts * batched
        for expert, load in enumerate(loads):
            begins.append(end)
            if load > batched:
                beyond.append((expert, end, end + _round_up(load - batched, unit)))
                end = beyond[-1][2]
        expert_P = ids_NK.flatten()[order_P]
        place_P = torch.arange(num_pairs, device=ids_NK.device) - (load_E.cumsum(0) - load_E)[expert_P]
        begin_P = torch.tensor(begins, device=ids_NK.device)[expert_P]
        row_P = torch.where(place_P < batched, expert_P * batched, begin_P - batched) + place_P
        pair_R = torch.full((end,), num_pairs, device=ids_NK.device)
        pair_R[row_P] = order_P
        row_NK = torch.empty_like(order_P)
        row_NK[order_P] = row_P
        token_R = (pair_R // ids_NK.shape[1]).clamp_(max=len(ids_NK) - 1)
        return _Rows(pair_R, token_R, row_NK.view_as(ids_NK), batched, beyond)

    def product(self, x_RI: Tensor, weights_EIO: Tensor) -> Tensor:
        """Return (R, O): each row times its expert's (I, O) weight."""
        out_RO = x_RI.new_empty(len(x_RI), weights_EIO.shape[2])
        num_experts, end = len(weights_EIO), len(weights_EIO) * self.batched
        batched_product(
            x_RI[:end].view(num_experts, self.batched, x_RI.shape[1]),
            weights_EIO,
            out_RO[:end].view(num_experts, self.batched, out_RO.shape[1]),
        )
        for expert, start, stop in self.beyond:
            torch.mm(x_RI[start:stop], weights_EIO[expert], out=out_RO[start:stop])
        return out_RO

    def weight_gradient(self, grad_RO: Tensor, x_RI: Tensor, num_experts: int) -> Tensor:
        """Return the gradients (E, O, I) of the experts' (O, I) weights."""
        end = num_experts * self.batched
        grad_EOI = batched_product(
            grad_RO[:end].view(num_experts, self.batched, grad_RO.shape[1]).mT,
            x_RI[:end].view(num_experts, self.batched, x_RI.shape[1]),
        )
        for expert, start, stop in self.beyond:
            grad_EOI[expert].addmm_(grad_RO[start:stop].T, x_RI[start:stop])
        return grad_EOI

    def collect(self, rows_RD: Tensor, weights_NK: Tensor | None = None) -> Tensor:
        """Return (N, D): for each token, the (weighted) sum of its choices' rows."""
        if rows_RD.device.type == "cpu":
            # One pass over memory; gathering the rows and summing them takes three.
            return F.embedding_bag(self.row_NK, rows_RD, mode="sum", per_sample_weights=weights_NK)
        rows_NKD = rows_RD.index_select(0, self.row_NK.flatten()).unflatten(0, self.row_NK.shape)
        return (rows_NKD if weights_NK is None else rows_NKD * weights_NK[..., None]).sum(1)


class _PaddedExperts(torch.autograd.Function):
    """Run all experts from copies of their weights. `parameters` are passed only to receive the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        both_E2FD: Tensor,
        down_EDF: Tensor,
        rows: _Rows,
        *parameters: Tensor,
    ) -> Tensor:
        with torch.autocast(x_ND.device.type, enabled=False):
            both_R2F = rows.product(x_ND.index_select(0, rows.token_R), both_E2FD.mT)
            gate_RF, up_RF = both_R2F.chunk(2, dim=-1)
            y_RD = rows.product(F.silu(gate_RF).mul_(up_RF), down_EDF.mT)
            ctx.save_for_backward(x_ND, weights_NK, both_R2F, both_E2FD, down_EDF)
            ctx.rows = rows
            return rows.collect(y_RD, weights_NK.to(x_ND.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, both_R2F, both_E2FD, down_EDF = ctx.saved_tensors
        rows, num_experts = ctx.rows, len(both_E2FD)
        gate_RF, up_RF = both_R2F.chunk(2, dim=-1)
        with_padding = torch.cat((weights_NK.flatten(), weights_NK.new_zeros(1)))
        weight_R1 = with_padding.index_select(0, rows.pair_R).to(x_ND.dtype)[:, None]
        grad_RD = grad_ND.to(x_ND.dtype).index_select(0, rows.token_R)
        grad_h_RF = rows.product(grad_RD, down_EDF)
        silu_RF = F.silu(gate_RF)
        h_RF = silu_RF * up_RF
        grad_weights_NK = torch.linalg.vecdot(grad_h_RF, h_RF).float()[rows.row_NK]
        grad_h_RF.mul_(weight_R1)
        grad_down_EDF = rows.weight_gradient(grad_RD, h_RF.mul_(weight_R1), num_experts).float()
        grad_both_R2F = torch.empty_like(both_R2F)
        grad_gate_RF, grad_up_RF = grad_both_R2F.chunk(2, dim=-1)
        torch.mul(grad_h_RF, silu_RF, out=grad_up_RF)
        torch.ops.aten.silu_backward.grad_input(grad_h_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
        grad_both_E2FD = rows.weight_gradient(grad_both_R2F, x_ND.index_select(0, rows.token_R), num_experts)
        grad_x_ND = rows.collect(rows.product(grad_both_R2F, both_E2FD))
        grad_gate_EFD, grad_up_EFD = (part.float() for part in grad_both_E2FD.chunk(2, dim=1))
        return grad_x_ND, grad_weights_NK, None, None, None, grad_gate_EFD, grad_up_EFD, grad_down_EDF
