"""The loss as one module, and its wrappers: torch.compile, DistributedDataParallel, FSDP2."""

import contextlib
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightlm import checkpoint
from lightlm.model.attention import offsets_from, offsets_in_documents
from lightlm.model.dropout import Dropout
from lightlm.model.experts import keep_padding_uncompiled
from lightlm.model.moe import Router, Routing
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe, TrainSection
from lightlm.sharding import whole
from lightlm.train.distributed import World
from lightlm.train.step.divergence import Mix, SoftTargets
from lightlm.train.step.loss import Lesson, target_losses, token_losses
from lightlm.train.step.routers import RouterLosses, router_losses
from lightlm.train.step.teacher import Teacher


class MicroBatch(NamedTuple):
    """What one pass of training reads, on the device.

    Attributes:
        samples_B: with dropout, the numbers of the rows' samples in the run.
        starts_BT: in a run with conversations, which inputs begin a document; negative targets then do not count.
        trained_share: then, the share of the global batch's targets that counts: a scalar.
        taught: with `train.distill`, what the teacher says.
        mtp_weight: the weight of multi-token prediction in this step, a scalar; None without it.
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    samples_B: Tensor | None = None
    starts_BT: Tensor | None = None
    trained_share: Tensor | None = None
    taught: SoftTargets | None = None
    mtp_weight: Tensor | None = None


class PassLoss(NamedTuple):
    """Results of one micro-batch.

    Attributes:
        objective: what is differentiated: the loss, the z-loss, and the routers' losses times the number of tokens.
    """

    objective: Tensor
    loss: Tensor  # the summed cross-entropy, in nats
    load_LE: Tensor | None  # tokens per expert and layer; None without experts
    z: Tensor | None = None  # the summed logsumexp(logits)^2; None without `train.z_loss`
    kl: Tensor | None = None  # the summed divergence from a teacher, times T^2; None without `train.distill`
    mtp_2: Tensor | None = None  # the summed cross-entropy of multi-token prediction, and its number of targets


class LossModule(nn.Module):
    """`token_losses` as a module: the root that every wrapper needs.

    Args:
        separator: the token at which a document begins, to keep attention inside documents.
    """

    def __init__(
        self,
        model: Transformer,
        router_losses: RouterLosses,
        train: TrainSection | None = None,
        separator: int | None = None,
    ) -> None:
        super().__init__()
        self.separator = separator
        self.model = model
        self.router_losses = router_losses
        self.z_loss = train.z_loss if train else 0.0
        distill = train.distill if train else None
        self.mix = Mix(distill.weight, distill.temperature) if distill else None
        self.dropout, self.seed = (train.dropout, train.seed) if train else (0.0, 0)

    def forward(self, batch: MicroBatch, *, each_target: bool = False) -> PassLoss | Tensor:
        """Return the losses of a micro-batch, or with `each_target` the cross-entropy of each target, fp32 (B x T,)."""
        inputs_BT, targets_BT, samples_B, starts_BT, trained_share, taught, mtp_weight = batch
        masked = starts_BT is not None
        offsets_BT = self.offsets(batch)
        if each_target:
            return target_losses(self.model, inputs_BT, targets_BT, offsets_BT, masked=masked)
        routings: list[Routing] = []
        sums = token_losses(
            self.model,
            inputs_BT,
            targets_BT,
            routings,
            z_loss=self.z_loss,
            dropout=Dropout(self.dropout, self.seed, samples_B) if self.dropout and samples_B is not None else None,
            offsets_BT=offsets_BT,
            masked=masked,
            lesson=None if taught is None or self.mix is None else Lesson(taught, self.mix),
            mtp_weight=mtp_weight,
        )
        if not routings:
            return PassLoss(sums.objective, sums.loss, None, sums.z, sums.kl, sums.mtp_2)
        # Routers learn from every token. The sums are divided by the targets that count, this one by all.
        weight = targets_BT.numel() if trained_share is None else targets_BT.numel() * trained_share
        objective = sums.objective + weight * self.router_losses(routings)
        load_LE = torch.stack([routing.load_E for routing in routings])
        return PassLoss(objective, sums.loss.detach(), load_LE, sums.z, sums.kl, sums.mtp_2)

    def offsets(self, batch: MicroBatch) -> Tensor | None:
        """Return the place of each input in its document, if attention stays inside documents."""
        if self.separator is None:
            return None
        if batch.starts_BT is None:
            return offsets_in_documents(batch.inputs_BT, self.separator)
        return offsets_from(batch.starts_BT)


class ParallelLoss:
    """The loss of a micro-batch, with gradients averaged over the processes.

    Args:
        recipe: `train.parallel=ddp` keeps a copy of everything in each process; `fsdp` shards parameters, gradients and
            optimizer state (FSDP2). With one process, both are the plain model. `train.compile` is true or false.
        dtype: the precision of matrix products, in which FSDP gathers the blocks' weights.
        separator: see `LossModule`.
        teacher: computes what `train.distill` learns from, where it is not stored.
    """

    def __init__(
        self,
        model: Transformer,
        world: World,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        separator: int | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        strategy, compiled = recipe.train.parallel, recipe.train.compile is True
        self.model = model
        self.sharded = strategy == "fsdp" and world.size > 1
        self.replicated = strategy == "ddp" and world.size > 1
        self.world, self.device, self.dtype = world, device, dtype
        self._local = LossModule(model, router_losses(recipe), recipe.train, separator)
        # FSDP's hooks sit between the blocks; on a CPU, all blocks are one graph, quick to compile.
        if compiled and (self.sharded or device.type == "cpu"):
            model.compile_blocks()
        elif compiled:
            keep_padding_uncompiled()
            self._local.compile()
        self._root: nn.Module = self._local
        self._teacher = teacher  # beside the module: neither sharded nor saved
        if self.sharded:
            _shard(self._local, world, device, dtype)
        elif self.replicated:
            self._root = _replicate(self._local, device, compiled)

    def __call__(self, batch: MicroBatch) -> PassLoss:
        """Return the losses of a training pass. The objective's backward pass must run inside `synchronized`."""
        if self._teacher is not None:
            batch = batch._replace(taught=self._teacher(batch.inputs_BT, self._local.offsets(batch)))
        return self._root(batch)

    def evaluate(self, inputs_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of each target, in nats: fp32 (B x T,), without gradients.

        With FSDP all processes must call it equally often.
        """
        with torch.no_grad():
            return self._local(MicroBatch(inputs_BT, targets_BT, starts_BT=starts_BT), each_target=True)

    def synchronized(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward and backward pass; `last`: the last one of a batch.

        DDP averages gradients only in the last pass. FSDP averages them in each: keeping whole gradients until the last
        pass would take the memory that it saves.
        """
        if isinstance(self._root, nn.parallel.DistributedDataParallel) and not last:
            return self._root.no_sync()
        return contextlib.nullcontext()

    def communicates(self, last: bool) -> bool:
        """Return whether a pass inside `synchronized(last)` waits for other processes."""
        return self.sharded or (self.replicated and last)

    def forget_gathered_weights(self) -> None:
        """Drop what FSDP has gathered, because the shards have changed. Its last group stays gathered after a pass."""
        from torch.distributed.fsdp import FSDPModule

        for module in self._local.modules() if self.sharded else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole_model(self) -> Transformer:
        """Return the unsharded model, for saving and generating. With FSDP it is a copy: all processes must call."""
        if not self.sharded:
            return self.model
        state = {name: whole(tensor).detach() for name, tensor in self.model.state_dict().items()}
        return checkpoint.build_model(self.model.config, state, "the sharded run").eval()


def _replicate(module: nn.Module, device: torch.device, compiled: bool) -> nn.Module:
    if compiled:
        # It would cut the compiled graph at the buckets, and it refuses a graph with the head's own backward pass.
        torch._dynamo.config.optimize_ddp = False
    # Each process keeps its own buffers: a broadcast would replace the others' counts. Torch 2.13 renamed the option.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {"gradient_as_bucket_view": True, option: False}
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=devices, **settings)


def _shard(module: LossModule, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Apply FSDP2 (arXiv 2304.11277): one group per block and head of multi-token prediction, then one for the rest.

    Under mixed precision, blocks are gathered in `dtype`, which halves the traffic. Routers, tables and the head stay
    fp32: the head sums its gradient chunk by chunk, and autocast casts for its products anyway.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    low = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in (*module.model.blocks, *module.model.mtp):
        for router in (part for part in block.modules() if isinstance(part, Router)):
            fully_shard(router, mesh=mesh, mp_policy=full)
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(module, mesh=mesh, mp_policy=full)
