"""Memory of training and inference by part, counted from shapes before anything is built."""

import math
import re

import torch
from torch.nn import Parameter

from lightlm.model.transformer import Transformer
from lightlm.optim.groups import parameter_groups
from lightlm.optim.section import OptimizerSection
from lightlm.recipe import Recipe
from lightlm.train.step.activations import (
    activation_bytes,
    backward_bytes,
    document_mask_bytes,
    expert_gradient_bytes,
    mask_bytes,
)
from lightlm.train.step.compilation import compiles
from lightlm.train.step.loss import head_loss_bytes


def optimizer_bytes(model: Transformer, section: OptimizerSection) -> int:
    """Return the bytes of the optimizer's state."""
    groups = parameter_groups(model, section)
    return sum(section.state_bytes(group["name"], tuple(p.shape)) for group in groups for p in group["params"])


def training_parts(
    recipe: Recipe, model: Transformer, device: torch.device, dtype: torch.dtype, sequences: int
) -> dict[str, int]:
    """Return the bytes on the training device by part. A run that accumulates gradients holds all parts at once.

    Args:
        model: may be on the meta device.
        sequences: sequences per micro-batch.
    """
    config, mixed, tokens = model.config, dtype != torch.float32, sequences * recipe.seq_len
    recompute, depth = recipe.train.activation_checkpointing, len(model.mtp)
    parameters = model.num_parameters()["total"] + model.mtp_parameters
    compiled, on_cpu = compiles(recipe, model, device, dtype), device.type == "cpu"
    if mixed:
        copies = 2 * sum(p.numel() for name, p in _layers(model) if "norm" not in name)
    else:
        copies = 4 * _joined(model) if on_cpu and not compiled else 0
    if config.multipliers != "none" and (compiled or not on_cpu):  # products with rows, and in fp32 with columns too
        copies += (4 * (not mixed) + 4 * (config.multipliers == "both")) * _multiplied(model)
    accumulates = recipe.batch_sequences > sequences  # the head's gradient then exists twice
    activations = activation_bytes(
        config,
        mixed=mixed,
        fused=compiled or on_cpu,
        recompute=recompute,
        dropout=recipe.train.dropout > 0,
        mtp_depth=depth,
    )
    average = {"ema": 4 * parameters} if recipe.train.averages else {}
    masks = mask_bytes(config, recipe.seq_len, mixed=mixed, mtp_depth=depth)
    if recipe.data.document_mask:
        way = {"mixed": mixed, "compiled": compiled, "recompute": recompute}
        masks = document_mask_bytes(config, recipe.seq_len, sequences, device_type=device.type, **way, mtp_depth=depth)
    # Of the output head by each earlier loss: the gradients of its weight and of its input, and the input.
    earlier = depth * (4 * config.vocab_size + (4 if dtype == torch.float32 else 2) * 2 * tokens) * config.hidden_size
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": optimizer_bytes(model, recipe.optimizer),
        **average,
        "weight_copies": copies,
        "activations": tokens * activations + masks,
        "logits": earlier
        + head_loss_bytes(tokens, config.hidden_size, config.vocab_size, device.type, dtype, accumulates=accumulates),
        "backward": tokens * backward_bytes(config, mixed=mixed) + expert_gradient_bytes(config, mixed=mixed),
    }


def _layers(model: Transformer) -> list[tuple[str, Parameter]]:
    """Return the parameters of the blocks and of the heads of multi-token prediction, by name."""
    return [*model.blocks.named_parameters(), *model.mtp.named_parameters()]


def _joined(model: Transformer) -> int:
    """Return the numbers that are copied only to join layers which share an input, or to multiply weights."""
    names = {"q_proj", "k_proj", "v_proj", "attention.gate_proj"}
    names |= {"q_a_proj", "kv_a_proj", "k_rope_proj", "k_b_proj", "v_b_proj"}  # of latent attention
    names |= {"gate_proj", "up_proj"} if model.config.mlp == "swiglu" else set()
    if model.config.multipliers != "none":
        joined = re.compile(rf"\b({'|'.join(sorted(names))})\.bias$")
        return _multiplied(model) + sum(p.numel() for name, p in _layers(model) if joined.search(name))
    joined = re.compile(rf"\b({'|'.join(sorted(names))})\b|experts\.(gate|up)_proj")
    return sum(p.numel() for name, p in _layers(model) if joined.search(name))


def _multiplied(model: Transformer) -> int:
    """Return the weights that have multipliers."""
    matrix = re.compile(r"_proj(\.weight)?$")
    return sum(p.numel() for name, p in _layers(model) if matrix.search(name))


def inference_parts(model: Transformer) -> dict[str, int]:
    """Return the bytes of the weights, and of the cache of one sequence of max_seq_len and of one token of it.

    Each is there in bf16 and in fp32.
    """
    config, parameters = model.config, model.num_parameters()["total"]
    per_token = config.depth * math.prod(config.cached_shape)
    cached = per_token * config.max_seq_len
    return {
        "weights_bfloat16": 2 * parameters,
        "weights_float32": 4 * parameters,
        "cache_bfloat16": 2 * cached,
        "cache_float32": 4 * cached,
        "token_bfloat16": 2 * per_token,
        "token_float32": 4 * per_token,
    }
