"""How much goes through a model at once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lightlm.evaluate.scoring.packing import Tree
from lightlm.model.config import ModelConfig

# Positions of a batch for each thread of a CPU: the activations of more no longer fit its caches.
_CPU_POSITIONS = 1024
_MPS_POSITIONS = 16384  # its memory is the system's, and what is free is not known
_CUDA_LIMITS = 4096, 131072
_GENERATED = 8  # a decoding step reads all weights whatever its rows, and computes one position of each


@dataclass(frozen=True)
class BatchSize:
    """Limits of one batch: `sequences` if given, else so many positions, padding included."""

    positions: int
    sequences: int | None = None

    @classmethod
    def of(cls, batch_size: int | str, device: torch.device, config: ModelConfig | None = None) -> "BatchSize":
        """From a command line's `auto` or number.

        Args:
            config: of the model, for whose activations a GPU's free memory is shared out.

        Raises:
            ValueError: it is neither.
        """
        sequences = None if str(batch_size).startswith("auto") else int(batch_size)
        if sequences is not None and sequences < 1:
            raise ValueError(batch_size)
        return cls(_positions(device, config), sequences)

    def fits(self, sequences: int, length: int) -> bool:
        if self.sequences is not None:
            return sequences <= self.sequences
        return sequences == 1 or sequences * length <= self.positions

    def for_decoding(self) -> "BatchSize":
        """The limits of a batch that is decoded token by token."""
        return replace(self, positions=_GENERATED * self.positions)

    def halved(self) -> "BatchSize":
        """After the device's memory did not suffice.

        Raises:
            torch.OutOfMemoryError: there is nothing left to halve.
        """
        if self.sequences == 1 or self.positions < 2:
            raise torch.OutOfMemoryError("the device's memory does not hold a single request")
        sequences = None if self.sequences is None else self.sequences // 2
        return BatchSize(self.positions // 2, sequences)


def _positions(device: torch.device, config: ModelConfig | None) -> int:
    if device.type == "mps":
        return _MPS_POSITIONS
    if device.type != "cuda":
        return _CPU_POSITIONS * torch.get_num_threads()
    low, high = _CUDA_LIMITS
    if config is None:
        return low
    free, _ = torch.cuda.mem_get_info(device)
    config = config.resolved()
    # At a time there live the residual stream, a block's input and output and what is inside, and a mask's row, in
    # fp32; half of the memory is left for what is not counted.
    width = 6 * config.hidden_size + 3 * config.intermediate_size + config.max_seq_len
    width += 3 * config.num_experts_per_tok * config.moe_intermediate_size if config.num_experts else 0
    return max(low, min(high, free // 2 // (4 * width)))


def batches(trees: list[Tree], limits: BatchSize) -> Iterator[list[Tree]]:
    """Trees, longest first, in batches; a tree that is too large alone is a batch of its own."""
    batch: list[Tree] = []
    requests = 0
    for tree in trees:
        rows = len(batch) + 1 if limits.sequences is None else requests + len(tree.requests)
        if batch and not limits.fits(rows, len(batch[0])):
            yield batch
            batch, requests = [], 0
        batch.append(tree)
        requests += len(tree.requests)
    if batch:
        yield batch
