"""Dropout without random generators: each mask is a function of the seed, the sample and the place in the model.

So masks do not depend on micro-batches, processes, interruptions or recomputation. Dropout applies to the embeddings
and to the output of each residual branch, as in the first Transformer (arXiv 1706.03762, section 5.4).

Shapes: B samples, T positions, D hidden size, S sites (the embeddings, then two branches per layer).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SITE = 1 << 32  # more than positions
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: SplitMix64's step


class BranchDropout(NamedTuple):
    """Dropout of one block."""

    rate: float
    keys_2BT: Tensor  # int32, for attention and for the feed-forward network


@dataclass(frozen=True)
class Dropout:
    """Dropout of a training pass.

    Args:
        rate: the share of values that become 0; the others are divided by 1 - rate.
        seed: that of the run.
        samples_B: the number of each row's sample in the run, int64, on the model's device.
    """

    rate: float
    seed: int
    samples_B: Tensor

    def embeddings(self, x_BTD: Tensor) -> Tensor:
        """Drop values of the embeddings."""
        site = torch.zeros(1, dtype=torch.int64, device=x_BTD.device)
        return drop(x_BTD, self._keys(site, x_BTD.shape[1])[0], self.rate)

    def branches(self, layers: int, length: int) -> list[BranchDropout]:
        """Return the dropout of each layer."""
        sites_S = torch.arange(1, 1 + 2 * layers, device=self.samples_B.device)
        keys_L2BT = self._keys(sites_S, length).unflatten(0, (layers, 2))
        return [BranchDropout(self.rate, keys_2BT) for keys_2BT in keys_L2BT]

    def _keys(self, sites_S: Tensor, length: int) -> Tensor:
        """Return 32 random bits per site, sample and position: int32 (S, B, T)."""
        seed = torch.full((), _signed(self.seed * _GOLDEN), dtype=torch.int64, device=self.samples_B.device)
        samples_B = _mix(_mix(seed) + self.samples_B)
        places_ST = sites_S[:, None] * _SITE + torch.arange(length, device=sites_S.device)
        return (_mix(samples_B[:, None] + places_ST[:, None]) >> 32).to(torch.int32)


def drop(x_BTD: Tensor, keys_BT: Tensor, rate: float) -> Tensor:
    """Set a share `rate` of the values to 0 and divide the others by 1 - rate."""
    # MurmurHash3's finalizer (Appleby, 2008) of a counter over the channels that begins at the row's key. Its last step
    # is left out: it changes only the low bits. Shifts of int32 copy the sign, so each is masked. The counter's step is
    # 1, because a large one overflows in the C++ of torch.compile, whose behavior is then undefined.
    bits_BTD = keys_BT[..., None] + torch.arange(x_BTD.shape[-1], device=x_BTD.device, dtype=torch.int32)
    bits_BTD ^= (bits_BTD >> 16) & 0xFFFF
    bits_BTD *= _signed(0x85EBCA6B, 32)
    bits_BTD ^= (bits_BTD >> 13) & 0x7FFFF
    bits_BTD *= _signed(0xC2B2AE35, 32)
    dropped_BTD = bits_BTD < round(rate * 2**32) - 2**31
    return x_BTD.masked_fill(dropped_BTD, 0.0) * (1 / (1 - rate))


def _mix(values: Tensor) -> Tensor:
    """Scatter int64 values over 64 bits, as `lightlm.data.hashing.mix`, which takes numpy's uint64."""
    values = (values ^ ((values >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ ((values >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return values ^ ((values >> 31) & (2**33 - 1))


def _signed(value: int, bits: int = 64) -> int:
    """Return the signed integer with the low bits of `value`."""
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value
