"""One module for the loss, and what is put around it: torch.compile, DistributedDataParallel, FSDP2."""

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from lightlm import checkpoint
from lightlm.model.transformer import Transformer
from lightlm.recipe import TrainSection
from lightlm.train.distributed import World
from lightlm.train.loss import token_loss

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def compiles(recipe: TrainSection, device: torch.device) -> bool:
    """Whether a run on this device uses torch.compile: where asked, else on CUDA."""
    return recipe.compile is True or (recipe.compile == "auto" and device.type == "cuda")


class LossModule(nn.Module):
    """`token_loss` as a module: the root that every wrapper needs, so that none of them reaches into the model."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return token_loss(self.model, inputs_BT, targets_BT)


class ParallelLoss:
    """The loss of a micro-batch, with gradients averaged over the processes.

    Args:
        strategy: `ddp`, a copy of everything in each process; or `fsdp`, parameters, gradients and optimizer state
            sharded (FSDP2). In a world of one both are the plain model.
        dtype: the precision that FSDP gathers the blocks' weights in.
    """

    def __init__(
        self,
        model: Transformer,
        world: World,
        *,
        strategy: str,
        compiled: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.sharded = strategy == "fsdp" and world.size > 1
        self.replicated = strategy == "ddp" and world.size > 1
        self._world = world
        self._local = LossModule(model)
        if compiled:
            # FSDP's hooks sit between the blocks, so each is compiled alone.
            for module in model.blocks if self.sharded else [self._local]:
                module.compile()
        self._root: nn.Module = self._local
        if self.sharded:
            _shard(self._local, world, device, dtype)
        elif self.replicated:
            self._root = _replicate(self._local, device, compiled)

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The summed loss; its backward pass must run inside `synchronised`."""
        return self._root(inputs_BT, targets_BT)

    def evaluate(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The summed loss without gradients. With FSDP all processes must call it equally often."""
        return self._local(inputs_BT, targets_BT)

    def synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward and backward pass. DDP averages gradients in the last of a batch only.

        FSDP does in each: whole gradients, kept until the last, are the memory that it is there to save.
        """
        if isinstance(self._root, nn.parallel.DistributedDataParallel) and not last:
            return self._root.no_sync()
        return contextlib.nullcontext()

    def communicates(self, last: bool) -> bool:
        """Whether a pass inside `synchronised(last)` waits for other processes."""
        return self.sharded or (self.replicated and last)

    def whole_model(self) -> Transformer:
        """The model in one piece, for saving and generating. With FSDP a copy, for which all processes must call."""
        if not self.sharded:
            return self.model
        state = {name: whole(tensor).detach() for name, tensor in self.model.state_dict().items()}
        return checkpoint.build_model(self.model.config, state, "the sharded run").eval()


def _replicate(module: nn.Module, device: torch.device, compiled: bool) -> nn.Module:
    if compiled:
        # It would cut the compiled graph at the buckets, and refuses a graph with the head's own backward in it.
        torch._dynamo.config.optimize_ddp = False
    # Buffers belong to each process: broadcast, one process's counts would replace the others'. Renamed in torch 2.13.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )


def _shard(module: LossModule, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """FSDP2 (arXiv 2304.11277): each block a group of its own, then all that remains.

    Under mixed precision, blocks are gathered in `dtype`, half of the traffic. The tables and the head stay fp32:
    the head adds its gradient up chunk by chunk, and autocast casts for its products anyway, as in one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    low = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in module.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))


def is_sharded(value: Any) -> TypeGuard["DTensor"]:
    """Whether this is a DTensor, of which each process holds a part."""
    return hasattr(value, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, which takes all processes; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor on the parameter's device, and sharded as it is; a scalar such as a step count is never sharded."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter) or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # No source rank: each process holds the whole tensor, and keeps its own part of it.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
