"""Mixing 64-bit integers, with the same result on every machine."""

import numpy as np


def mix(values: np.ndarray) -> np.ndarray:
    """Scatter uint64 values over 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
