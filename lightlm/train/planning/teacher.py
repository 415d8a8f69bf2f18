"""What learning from a teacher takes: operations, memory, and the disk of a stored one."""

from typing import Any

import torch

from lightlm.convert.load import find_start
from lightlm.data.top_tokens import record_dtype
from lightlm.data.training_data import TrainingData
from lightlm.device import pick_dtype
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.recipe import STORED, Recipe
from lightlm.train.step.loss import chunk_rows, taught_rows
from lightlm.train.teaching.load import ASSUMED_TOP_K

_FP32_SLICES = 5  # fp32 tensors of a slice's logits that the divergence holds at once
_RECORD_BYTES = 12  # of a stored token in memory: an int64 id and an fp32 logarithm


def teacher_of(recipe: Recipe) -> Transformer | None:
    """Return the teacher of a run without its weights, on the meta device; None without one, or with a stored one.

    Raises RecipeError where there is no such model.
    """
    distill = recipe.train.distill
    if distill is None or distill.teacher == STORED:
        return None
    with torch.device("meta"):
        return Transformer(find_start(distill.teacher, "train.distill.teacher").model)


def forward_flops(teacher: Transformer, seq_len: int) -> int:
    """Return the operations per token of a pass without gradients: a third of those of training."""
    return teacher.flops_per_token(seq_len) // 3


def teacher_facts(
    recipe: Recipe, teacher: Transformer | None, data: TrainingData | None, tokens: int
) -> dict[str, Any] | None:
    """Return the part of a plan about the teacher; None for a run without one.

    Args:
        tokens: of the run.
    """
    distill = recipe.train.distill
    if distill is None:
        return None
    top_k = ASSUMED_TOP_K
    if teacher is None and data is not None:
        top_k = data.main.top_tokens()[0].top_k
    record = record_dtype(min(top_k, recipe.model.vocab_size), recipe.model.vocab_size).itemsize
    flops = None if teacher is None else forward_flops(teacher, recipe.seq_len)
    return {
        "teacher": distill.teacher,
        "parameters": None if teacher is None else teacher.num_parameters()["total"],
        "flops_per_token": flops,
        "flops": None if flops is None else flops * tokens,
        "record_bytes": record,
        "disk": None if data is None else record * data.tokens("train"),
    }


def teacher_bytes(
    recipe: Recipe, teacher: Transformer | None, device: torch.device, dtype: torch.dtype, tokens: int
) -> dict[str, int]:
    """Return the bytes that a teacher adds to a micro-batch of so many tokens, by part; nothing without one.

    Args:
        dtype: precision of training, which that of the teacher is without a better answer.
    """
    distill = recipe.train.distill
    if distill is None:
        return {}
    vocab_size = recipe.model.vocab_size
    slices = _FP32_SLICES * 4 * taught_rows(vocab_size, device.type) * vocab_size
    if teacher is None:
        return {"teacher": slices + _RECORD_BYTES * ASSUMED_TOP_K * tokens}
    config = teacher.config
    if distill.dtype != "auto" or device.type == "cpu":
        dtype = pick_dtype(distill.dtype, device, config.hidden_size)
    element, whole = dtype.itemsize, device.type == "cpu" and dtype == torch.float32
    matrices = sum(p.numel() for p in teacher.blocks.parameters() if p.ndim > 1)
    rest = teacher.num_parameters()["total"] - matrices
    head = 0 if whole else element * config.vocab_size * config.hidden_size
    logits = element * min(chunk_rows(device.type), tokens) * config.vocab_size
    return {
        "teacher": element * matrices + 4 * rest + head,
        "teacher_pass": tokens * _pass_bytes(config, element) + logits + slices,
    }


def _pass_bytes(config: ModelConfig, element: int) -> int:
    """Return the bytes per token that the widest layer of a pass without gradients holds."""
    inner = max(3 * config.intermediate_size, 4 * config.num_heads * config.head_dim)
    return 3 * 4 * config.hidden_size + element * inner
