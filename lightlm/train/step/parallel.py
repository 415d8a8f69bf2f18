"""One module for the loss, and what is put around it: torch.compile, DistributedDataParallel, FSDP2."""

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from lightlm import checkpoint
from lightlm.model.experts import keep_padding_uncompiled
from lightlm.model.moe import Router, Routing
from lightlm.model.transformer import Transformer
from lightlm.train.distributed import World
from lightlm.train.step.loss import token_loss
from lightlm.train.step.routers import RouterLosses

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class PassLoss(NamedTuple):
    """Of one micro-batch."""

    objective: Tensor  # what gradients are taken of: the loss, and the routers' losses times the tokens
    loss: Tensor  # the summed cross-entropy, in nats
    load_LE: Tensor | None  # tokens that each expert of each layer got; None without experts


class LossModule(nn.Module):
    """`token_loss` as a module: the root that every wrapper needs, so that none of them reaches into the model."""

    def __init__(self, model: Transformer, router_losses: RouterLosses) -> None:
        super().__init__()
        self.model = model
        self.router_losses = router_losses

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> PassLoss:
        routings: list[Routing] = []
        loss = token_loss(self.model, inputs_BT, targets_BT, routings)
        if not routings:
            return PassLoss(loss, loss, None)
        objective = loss + targets_BT.numel() * self.router_losses(routings)
        return PassLoss(objective, loss.detach(), torch.stack([routing.load_E for routing in routings]))


class ParallelLoss:
    """The loss of a micro-batch, with gradients averaged over the processes.

    Args:
        strategy: `ddp`, a copy of everything in each process; or `fsdp`, parameters, gradients and optimizer state
            sharded (FSDP2). In a world of one both are the plain model.
        dtype: the precision that FSDP gathers the blocks' weights in.
        router_losses: of a mixture of experts.
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
        router_losses: RouterLosses,
    ) -> None:
        self.model = model
        self.sharded = strategy == "fsdp" and world.size > 1
        self.replicated = strategy == "ddp" and world.size > 1
        self._world = world
        self._local = LossModule(model, router_losses)
        # FSDP's hooks sit between the blocks; on a CPU, all blocks are one graph, quick to compile.
        if compiled and (self.sharded or device.type == "cpu"):
            model.compile_blocks()
        elif compiled:
            keep_padding_uncompiled()
            self._local.compile()
        self._root: nn.Module = self._local
        if self.sharded:
            _shard(self._local, world, device, dtype)
        elif self.replicated:
            self._root = _replicate(self._local, device, compiled)

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor) -> PassLoss:
        """The losses; the objective's backward pass must run inside `synchronised`."""
        return self._root(inputs_BT, targets_BT)

    def evaluate(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The summed cross-entropy without gradients. With FSDP all processes must call it equally often."""
        return self._local(inputs_BT, targets_BT).loss

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

    Under mixed precision, blocks are gathered in `dtype`, half of the traffic. Routers, tables and the head stay fp32:
    the head adds its gradient up chunk by chunk, and autocast casts for its products anyway, as in one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    low = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in module.model.blocks:
        for router in (part for part in block.modules() if isinstance(part, Router)):
            fully_shard(router, mesh=mesh, mp_policy=full)
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(module, mesh=mesh, mp_policy=full)


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
