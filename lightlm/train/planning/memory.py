"""Memory of training and inference by part, counted from shapes before anything is built."""

import torch

from lightlm.model.transformer import Transformer
from lightlm.optim.groups import parameter_groups
from lightlm.optim.section import OptimizerSection
from lightlm.recipe import Recipe
from lightlm.train.step.activations import activation_bytes, backward_bytes, expert_gradient_bytes, mask_bytes
from lightlm.train.step.compilation import compiles
from lightlm.train.step.loss import head_loss_bytes


def optimizer_bytes(model: Transformer, section: OptimizerSection) -> int:
    """Return the bytes of the optimizer's state."""
    groups = parameter_groups(model, section)
    return sum(section.state_bytes(group["name"]) * sum(p.numel() for p in group["params"]) for group in groups)


def training_parts(
    recipe: Recipe, model: Transformer, device: torch.device, dtype: torch.dtype, sequences: int
) -> dict[str, int]:
    """Return the bytes on the training device by part. A run that accumulates gradients holds all parts at once.

    Args:
        model: may be on the meta device.
        sequences: sequences per micro-batch.
    """
    config, mixed, tokens = model.config, dtype != torch.float32, sequences * recipe.seq_len
    parameters, recompute = model.num_parameters()["total"], recipe.train.activation_checkpointing
    fused = compiles(recipe, model, device) or (device.type == "cpu" and dtype == torch.bfloat16)
    products = sum(p.numel() for name, p in model.blocks.named_parameters() if "norm" not in name)
    accumulates = recipe.batch_sequences > sequences  # the head's gradient then exists twice
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": optimizer_bytes(model, recipe.optimizer),
        "weight_copies": 2 * products if mixed else 0,
        "activations": tokens * activation_bytes(config, mixed=mixed, fused=fused, recompute=recompute)
        + mask_bytes(config, recipe.seq_len, mixed=mixed),
        "logits": head_loss_bytes(
            tokens, config.hidden_size, config.vocab_size, device.type, dtype, accumulates=accumulates
        ),
        "backward": tokens * backward_bytes(config, mixed=mixed) + expert_gradient_bytes(config, mixed=mixed),
    }


def inference_parts(model: Transformer) -> dict[str, int]:
    """Return the bytes of the weights, and of the cache of one sequence of max_seq_len, in bf16 and in fp32."""
    config, parameters = model.config, model.num_parameters()["total"]
    cached = 2 * config.depth * config.num_kv_heads * config.head_dim * config.max_seq_len
    return {
        "weights_bfloat16": 2 * parameters,
        "weights_float32": 4 * parameters,
        "cache_bfloat16": 2 * cached,
        "cache_float32": 4 * cached,
    }
