"""The processes of a run: their ranks, their communication and their end.

torchrun, `lightlm train --nproc`, or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT starts
them, and on several machines LOCAL_RANK and LOCAL_WORLD_SIZE, which are those of one machine unless set. A world of one
process has no process group, and its methods do not communicate.
"""

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightlm.device import pick_device
from lightlm.errors import LightLMError, UsageError

RENDEZVOUS = "LIGHTLM_RENDEZVOUS"  # set by `lightlm train --nproc`: a file URL for the rendezvous, which needs no port
# The other processes wait while the first one writes samples. The death of a process is noticed at once.
_TIMEOUT = datetime.timedelta(hours=1)
T = TypeVar("T")


class PeerLostError(LightLMError):
    """Another process of the run ended or stopped answering. A launcher may restart all processes."""

    exit_code = 75  # EX_TEMPFAIL: try again


class World:
    """The processes of a run, seen from one of them."""

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, store: dist.Store | None = None
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.launched = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun or `lightlm train --nproc`
        self._launcher = os.getppid()
        self._store = store

    @property
    def is_writer(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0

    @property
    def abandoned(self) -> bool:
        """Whether the launcher was killed, so that nothing can restart or stop these processes."""
        return self.launched and os.getppid() != self._launcher

    def pick_device(self, name: str) -> torch.device:
        """Return this process's device.

        Raises:
            UsageError: the device is missing, or cannot be shared by the processes of this machine.
        """
        device = pick_device(name)
        if self.size == 1:
            return device
        if device.type == "mps":
            raise UsageError(
                f"{self.size} processes cannot train on MPS, which has no communication between processes; "
                "use one process, or train.device=cpu"
            )
        if device.type == "cuda":
            count = torch.cuda.device_count()
            if device.index is not None:
                raise UsageError(f"train.device={name} names one GPU for {self.size} processes; use train.device=cuda")
            if self.local_size > count:
                several = "" if "LOCAL_WORLD_SIZE" in os.environ else "set LOCAL_WORLD_SIZE and LOCAL_RANK on several, "
                raise UsageError(
                    f"{self.local_size} processes on this machine need a GPU each, and this one sees {count}; {several}"
                    f"start {count}, let each see all GPUs (no CUDA_VISIBLE_DEVICES or --gpus-per-task of one), or use "
                    "train.device=cpu"
                )
            return pick_device(f"cuda:{self.local_rank}")
        return device

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def from_writer(self, action: Callable[[], T]) -> T:
        """Run `action` in the writer's process; return its result, or raise its error, in all processes."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_writer:
            try:
                outcome[0] = action()
            except (LightLMError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any process."""
        if self.size == 1:
            return list(flags)
        # On the CPU: the exchange does not wait for work queued on a GPU.
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over all processes in place and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of ranks.

        Raises:
            PeerLostError: another process has ended.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.watched():
            dist.all_gather_object(values, value)  # on the CPU, by gloo
        return values

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn a failure of communication within the block into one message.

        Raises:
            PeerLostError: another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            # Gloo raises plain RuntimeErrors that name its source files.
            lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
            if self.size == 1 or not lost:
                raise
            atexit.register(_leave)
            raise PeerLostError(
                f"process {self.rank} of {self.size} lost its connection to the others, one of which has probably "
                f"ended; `lightlm train --resume` resumes from the last checkpoint. {error}"
            ) from error

    def first(self, event: str) -> bool:
        """Return whether this process is the first to claim `event`, such as the report of an error.

        The call does not wait for other processes.
        """
        if self._store is None:
            return True
        try:
            return self._store.add(event, 1) == 1
        except RuntimeError:  # the process that hosts the store has ended
            return self.is_writer


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """Context manager that connects this process with the others of its run and returns its `World`."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World()
        return
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    store, rank, size = next(dist.rendezvous(os.environ.get(RENDEZVOUS, "env://"), rank, size, timeout=_TIMEOUT))
    # torchrun's own store, with the addresses of dead processes in it, outlives a restart (torch 2.13).
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Gloo beside NCCL: flags and objects are exchanged on the CPU, without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield World(rank, size, local_rank, local_size, dist.PrefixStore("lightlm", store))
    finally:
        dist.destroy_process_group()


def _leave() -> None:
    """End the process before its C++ destructors run: gloo's wait for the lost process (torch 2.13: until killed)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(PeerLostError.exit_code)
