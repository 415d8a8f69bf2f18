"""An exponential moving average of a run's weights, in fp32 beside them and sharded like them."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightlm.model.transformer import Transformer
from lightlm.sharding import is_sharded, like_parameter, whole
from lightlm.train.step.parallel import ParallelLoss


def share_of_newest(batch_tokens: int, seen: int, half_life: float) -> float:
    """Return the weight that the average gives to the weights after a step.

    Weights lose half of their share every `half_life` tokens, so the average does not depend on the size of batches.
    All shares sum to 1 from the first step on: the initial weights have none (as Adam's correction, arXiv 1412.6980).

    Args:
        batch_tokens: tokens of the step.
        seen: tokens of all averaged steps, this one included.
    """
    rate = math.log(2) / half_life
    return math.expm1(-rate * batch_tokens) / math.expm1(-rate * seen)


class WeightAverage:
    """The average of a model's parameters and of its buffers, such as the selection biases of routers.

    Args:
        half_life: tokens after which weights have half of their share.
        began: tokens of the run before the first averaged step.
        state: the average so far, by name; required unless no step is averaged yet. Until the first one is, the average
            equals the weights.
    """

    def __init__(self, loss: ParallelLoss, half_life: int, began: int, state: dict[str, Tensor] | None = None) -> None:
        self.began = began
        self._half_life, self._loss = half_life, loss
        model: Transformer = loss.model
        kept = model.state_dict().keys()
        named = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._live = {name: tensor for name, tensor in named.items() if name in kept and tensor.is_floating_point()}
        self._average = {
            name: (live if state is None else like_parameter(state[name], live).to(live.dtype)).clone()
            for name, live in self._live.items()
        }

    @torch.no_grad()
    def update(self, tokens: int, batch_tokens: int) -> None:
        """Add the weights after a step.

        Args:
            tokens: tokens of the run after the step.
        """
        share = share_of_newest(batch_tokens, tokens - self.began, self._half_life)
        torch._foreach_lerp_(_local(self._average), _local(self._live), share)

    def state(self) -> dict[str, Tensor]:
        """Return the average by name. That of a sharded run is gathered: all processes must call."""
        return {name: whole(tensor) for name, tensor in self._average.items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager in which the model's weights are the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, average in zip(_local(self._live), _local(self._average), strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
        self._loss.forget_gathered_weights()


def _local(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return this process's parts."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors.values()]
