"""Cautious weight decay (arXiv 2510.12402)."""

from torch import Tensor


def cautious_decay_(parameter: Tensor, update: Tensor, rate: float) -> None:
    """Do parameter -= rate * parameter where update * parameter >= 0: where subtracting `update` also moves it to zero.

    The two tensors have the same shape.
    """
    agreeing = (update * parameter >= 0).to(parameter.dtype)  # not ge_: torch 2.11 cannot shard it
    parameter.addcmul_(parameter, agreeing, value=-rate)
