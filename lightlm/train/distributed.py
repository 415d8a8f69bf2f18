"""The processes of a run: who they are, what they tell each other, and how they leave.

torchrun, `lightlm train --nproc`, or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT starts
them. A world of one needs no process group, and every method of it is free.
"""

import atexit
import contextlib
import datetime
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightlm.device import pick_device
from lightlm.errors import LightLMError, UsageError

RENDEZVOUS = "LIGHTLM_RENDEZVOUS"  # set by `lightlm train --nproc`: the URL of a file to meet at, free of port clashes
# The others wait while the first process writes samples; a process that dies is noticed at once.
_TIMEOUT = datetime.timedelta(hours=1)
T = TypeVar("T")


class PeerLostError(LightLMError):
    """Another process of the run ended or stopped answering. A launcher may restart the group."""

    exit_code = 75  # EX_TEMPFAIL: try again


@dataclass(frozen=True)
class Launch:
    """Which launch this process belongs to: the same for all its processes and over its restarts."""

    id: str  # torchrun's --rdzv-id, or "none"
    host: str
    agent: int  # process id of torchrun
    restarts: int = field(default=0, compare=False)

    @classmethod
    def current(cls) -> "Launch | None":
        """What torchrun's variables say, which `lightlm train --nproc` sets too."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        return cls(os.environ["TORCHELASTIC_RUN_ID"], socket.gethostname(), os.getppid(), restarts)

    def made(self, record: dict[str, Any]) -> bool:
        """Whether a run's record (`launch.json`) is of this launch.

        After a restart on several machines the first process may stand on another one, under another agent: there
        the id alone decides. "none" is torchrun's default and says nothing.
        """
        if record.get("id") != self.id:
            return False
        if record.get("host") != self.host:
            return self.id != "none"
        return record.get("agent") == self.agent


class World:
    """The processes of a run, seen from one of them."""

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, store: dist.Store | None = None
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.launch = Launch.current()
        self._store = store

    @property
    def is_writer(self) -> bool:
        """Whether this process prints and writes files; there is exactly one."""
        return self.rank == 0

    @property
    def abandoned(self) -> bool:
        """Whether the launcher has been killed: nothing would restart or stop these processes any more."""
        return self.launch is not None and os.getppid() != self.launch.agent

    def pick_device(self, name: str) -> torch.device:
        """This process's device.

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
                raise UsageError(
                    f"{self.local_size} processes on this machine need a GPU each, and it has {count}; "
                    f"start {count}, or use train.device=cpu"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def from_writer(self, action: Callable[[], T]) -> T:
        """What `action` gives, or raises, in the writer's process; the others do not run it."""
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
        """Each flag's disjunction over all processes."""
        if self.size == 1:
            return list(flags)
        # On the CPU, whatever the device: it neither waits for a GPU's queue nor adds to it.
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes]

    def smallest(self, number: int) -> int:
        """The least of all processes' numbers."""
        if self.size > 1:
            numbers = torch.tensor([number])
            dist.all_reduce(numbers, dist.ReduceOp.MIN)
            number = int(numbers)
        return number

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, which replaces the tensor's content."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks.

        Raises:
            PeerLostError: another process is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.watched():
            dist.all_gather_object(values, value)  # on the CPU, by gloo
        return values

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turns failures of communication within the block into one message.

        Raises:
            PeerLostError: another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_communication_error(error):
                raise
            atexit.register(_leave)
            raise PeerLostError(
                f"process {self.rank} of {self.size} lost its connection to the others, one of which has probably "
                f"ended; `lightlm train --resume` goes on from the last checkpoint. {error}"
            ) from error

    def first(self, event: str) -> bool:
        """Whether this process is the first to claim `event`: one of them reports an error, not all.

        Needs no other process to be alive or to listen.
        """
        if self._store is None:
            return True
        try:
            return self._store.add(event, 1) == 1
        except RuntimeError:  # the store's host is gone
            return self.is_writer


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """This process's place among the launched ones, and communication between them while the block lasts."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World()
        return
    if not dist.is_available():
        raise UsageError(f"this build of torch has no torch.distributed, which {size} processes need; start one")
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    store, rank, size = next(dist.rendezvous(os.environ.get(RENDEZVOUS, "env://"), rank, size, timeout=_TIMEOUT))
    # torchrun's own store outlives its restarts, and the addresses of dead processes in it (torch 2.13).
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Gloo also beside NCCL: decisions and objects are exchanged on the CPU, without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield World(rank, size, local_rank, local_size, dist.PrefixStore("lightlm", store))
    finally:
        dist.destroy_process_group()


def _leave() -> None:
    """End the process before C++ does: gloo's destructors wait for the lost peer (torch 2.13: until it was killed)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(PeerLostError.exit_code)


def _is_communication_error(error: RuntimeError) -> bool:
    # Gloo's failures are plain RuntimeErrors that name its source files.
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
