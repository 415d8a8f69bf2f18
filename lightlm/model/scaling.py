"""Learnable scales of matrices; `convert` folds them into plain weights.

Row and column multipliers (arXiv 2601.04890) make the weight rows[:, None] * weight * columns. In training, that
product is computed once per pass or step: it has far fewer elements than the activations. Without gradients,
activations are multiplied: decoding reads each weight for few tokens, and copies of all weights would take longer.

Shapes: F features out, D features in; a stack of experts has a dimension before them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightlm.model.config import ModelConfig, Part

ROWS, COLUMNS = "row_multipliers", "column_multipliers"


def multiplier_shapes(config: ModelConfig, *shape: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the multipliers of a weight (..., F, D)."""
    shapes = {ROWS: shape[:-1], COLUMNS: (*shape[:-2], shape[-1])}
    kept = {"none": (), "rows": (ROWS,), "columns": (COLUMNS,), "both": (ROWS, COLUMNS)}[config.multipliers]
    return {name: shapes[name] for name in kept}


class Scaled(NamedTuple):
    """A weight (..., F, D) with its multipliers."""

    weight: Tensor
    rows: Tensor | None = None  # (..., F)
    columns: Tensor | None = None  # (..., D)

    @property
    def is_plain(self) -> bool:
        """Whether there are no multipliers."""
        return self.rows is None and self.columns is None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Scaled":
        """Return the weight and its multipliers, each changed."""
        rows, columns = (None if part is None else change(part) for part in self[1:])
        return Scaled(change(self.weight), rows, columns)

    def product(self) -> Tensor:
        """Return rows * weight * columns; the weight itself without multipliers."""
        weight = self.weight
        if self.rows is not None:
            weight = weight * self.rows[..., :, None]
        return weight if self.columns is None else weight * self.columns[..., None, :]

    def receiver(self) -> Tensor:
        """Return a stand-in for `product` where a copy of it exists: it passes the product's gradient on.

        Its values are the weight's, and must not be used.
        """
        return self.weight if self.is_plain else _Receiver.apply(*self)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x times the transposed product, plus bias; the weight has two dimensions."""
        if self.is_plain or torch.is_grad_enabled():
            return F.linear(x, self.product(), bias)
        y = F.linear(x if self.columns is None else x * self.columns.to(x.dtype), self.weight)
        if self.rows is not None:
            y = y * self.rows.to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)


class _Receiver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, rows, columns)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, rows, columns = ctx.saved_tensors
        weighted = grad * weight
        if rows is None:
            return grad * columns[..., None, :], None, weighted.sum(-2)
        grad_weight = grad * rows[..., :, None]
        if columns is None:
            return grad_weight, weighted.sum(-1), None
        grad_rows = (weighted @ columns[..., :, None]).squeeze(-1)
        grad_columns = (rows[..., None, :] @ weighted).squeeze(-2)
        return grad_weight.mul_(columns[..., None, :]), grad_rows, grad_columns


class Linear(nn.Linear):
    """A projection of a block, with the multipliers that `config` asks for. The bias is not multiplied."""

    row_multipliers: nn.Parameter | None
    column_multipliers: nn.Parameter | None

    def __init__(self, config: ModelConfig, in_features: int, out_features: int, part: Part) -> None:
        super().__init__(in_features, out_features, bias=config.has_bias(part))
        shapes = multiplier_shapes(config, out_features, in_features)
        for name in (ROWS, COLUMNS):
            self.register_parameter(name, nn.Parameter(torch.ones(shapes[name])) if name in shapes else None)

    def scaled(self) -> Scaled:
        """Return the weight with its multipliers."""
        return Scaled(self.weight, self.row_multipliers, self.column_multipliers)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled().linear(x, self.bias)
