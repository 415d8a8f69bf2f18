"""The size of a batch."""

from dataclasses import dataclass, replace

import torch

from lightlm.evaluate.settings import batch_sequences
from lightlm.model.config import ModelConfig

# Positions in a batch per CPU thread; the activations of more do not fit its caches.
_CPU_POSITIONS = 1024
_MPS_POSITIONS = 16384  # it shares the system's memory, of which the free part is unknown
_CUDA_LIMITS = 4096, 131072
_GENERATED = 8  # a decoding step reads all weights and computes one position per row, so more rows are cheap


@dataclass(frozen=True)
class BatchSize:
    """The limit of a batch: `sequences` if given, else `positions`, padding included."""

    positions: int
    sequences: int | None = None

    @classmethod
    def of(cls, batch_size: int | str, device: torch.device, config: ModelConfig | None = None) -> "BatchSize":
        """Return the limit for `auto` or a number of sequences, as on the command line.

        Args:
            config: the model's, whose activations must fit a GPU's free memory.

        Raises:
            UsageError: batch_size is neither.
        """
        return cls(_positions(device, config), batch_sequences(batch_size))

    def fits(self, sequences: int, length: int) -> bool:
        if self.sequences is not None:
            return sequences <= self.sequences
        return sequences == 1 or sequences * length <= self.positions

    def for_decoding(self) -> "BatchSize":
        """Return the limit of a batch that is decoded token by token."""
        return replace(self, positions=_GENERATED * self.positions)

    def halved(self) -> "BatchSize":
        """Return half the limit, after the device ran out of memory.

        Raises:
            torch.OutOfMemoryError: the limit is a single request.
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
    # At a time memory holds the residual stream, a block's input, output and inner activations, and a row of the mask,
    # in fp32. Half of the memory stays free for what is not counted.
    width = 6 * config.hidden_size + 3 * config.intermediate_size + config.max_seq_len
    width += 3 * config.num_experts_per_tok * config.moe_intermediate_size if config.num_experts else 0
    return max(low, min(high, free // 2 // (4 * width)))
