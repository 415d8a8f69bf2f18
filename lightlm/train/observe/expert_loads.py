"""The balance of experts: the `moe/` metrics of metrics.jsonl, which docs/metrics.md defines.

They depend only on the loads of a step's global batch and on the selection bias, so a resumed run repeats them.
Shapes: L layers of experts as run, E experts.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightlm.model.transformer import Transformer
from lightlm.train.step.routers import selection_bias_ranges

_EVERY_STEP_BITS = 8  # the first 2**8 steps all have metrics by layer


def load_metrics(model: Transformer, step: int, batch_tokens: int, loads: list[list[int]] | None) -> dict[str, Any]:
    """Return the metrics of one step after its update, empty for a model without experts.

    Args:
        loads: (L, E), tokens of the global batch that each expert received.
    """
    if loads is None:
        return {}
    load_LE = np.array(loads, dtype=np.int64)
    violation_L = load_LE.max(1) / load_LE.mean(1) - 1
    entropy_L = _entropy(load_LE)
    dead_L = (load_LE == 0).sum(1)
    metrics: dict[str, Any] = {
        "moe/violation": _digits(violation_L.mean()),
        "moe/violation_worst": _digits(violation_L.max()),
        "moe/entropy": _digits(entropy_L.mean()),
        "moe/entropy_lowest": _digits(entropy_L.min()),
        "moe/dead_experts": int(dead_L.sum()),
        "moe/dropped": batch_tokens * model.config.num_experts_per_tok * len(load_LE) - int(load_LE.sum()),
    }
    if not layers_are_due(step):
        return metrics
    metrics |= {
        "moe/load": loads,
        "moe/layer_violation": [_digits(value) for value in violation_L],
        "moe/layer_entropy": [_digits(value) for value in entropy_L],
        "moe/layer_dead_experts": dead_L.tolist(),
    }
    if (ranges := selection_bias_ranges(model)) is not None:
        metrics |= {
            "moe/bias_range": _digits(max(ranges)),
            "moe/layer_bias_range": [_digits(value) for value in ranges],
        }
    return metrics


def layers_are_due(step: int) -> bool:
    """Return whether a step also has metrics by layer and by expert.

    These are all steps up to 256, every second one up to 512, every fourth one up to 1,024, and so on: each doubling of
    a run's length adds 128 of them.
    """
    return step % (1 << max(step.bit_length() - _EVERY_STEP_BITS, 0)) == 0


def _entropy(load_LE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the entropy of each layer's shares / log E: 1 is balanced, 0 is one expert for all tokens."""
    if load_LE.shape[1] == 1:
        return np.ones(len(load_LE))
    share_LE = load_LE / load_LE.sum(1, keepdims=True)
    used_LE = np.where(share_LE > 0, share_LE, 1.0)
    return np.asarray(-(share_LE * np.log(used_LE)).sum(1) / math.log(load_LE.shape[1]))


def _digits(value: float) -> float:
    """Round to five digits: more than a plot shows, with a third of the characters."""
    return float(f"{value:.5g}")
