"""Tensors that FSDP2 shards: DTensors, of which each process holds a part."""

from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: Any) -> TypeGuard["DTensor"]:
    """Return whether the value is a DTensor."""
    return hasattr(value, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, for which all processes must call; return any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Move a tensor to the parameter's device and shard it likewise. A scalar such as a step count is not sharded."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter) or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # No source rank: each process holds the whole tensor, and keeps its own part of it.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
