"""Load a model to generate with."""

from pathlib import Path

import torch

from lightlm.checkpoint import LoadedModel
from lightlm.convert.load import load_pretrained
from lightlm.device import pick_dtype
from lightlm.generate.step.precision import decoding_dtype


def load_for_decoding(
    reference: str | Path | None, device: torch.device, dtype: str, weights: str | None, quantize: str | None = None
) -> LoadedModel:
    """Load a model as `load_pretrained` does, in the precision that decodes the fastest if `dtype` is "auto".

    Args:
        quantize: "int8" lets `Batch` compute with rounded weights.
    """
    if dtype == "auto" and device.type == "cpu":
        loaded = load_pretrained(reference, device, None, weights)
        # int8 products compute in bf16, as does what lies between them.
        loaded.model.to(dtype=torch.bfloat16 if quantize else decoding_dtype(loaded.model))
    else:
        loaded = load_pretrained(reference, device, pick_dtype(dtype, device), weights)
    loaded.model.round_decoding_to(quantize)
    return loaded
