"""Memory that training and inference take, by part: counted from shapes, before anything is built.

Shapes: D hidden size, F intermediate size, H query heads, G key/value heads, K head size, T positions of a sequence.
"""

import torch

from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.recipe import OptimizerSection
from lightlm.train.loss import head_loss_bytes
from lightlm.train.optimizers import MATRICES, parameter_groups


def activation_bytes(config: ModelConfig, *, mixed: bool, fused: bool, recompute: bool = False) -> int:
    """What autograd keeps of one token up to the head.

    Args:
        recompute: only the blocks' inputs are kept, and at the peak what one block makes anew.
        mixed: products run in 16 bits.
        fused: the hand-written gradients of `model/fused.py`; what torch.compile keeps depends on its version and is
            taken to be the same. Otherwise the plain operations as torch runs them on a CPU; CUDA's own RMSNorm keeps
            less, so there it is an upper bound.
    """
    config = config.resolved()
    element = 2 if mixed else 4
    layer = _fused_layer(config, element) if fused else _plain_layer(config, element)
    if recompute:
        return config.depth * 4 * config.hidden_size + layer + _norm(config, fused)
    return config.depth * layer + _norm(config, fused)


def mask_bytes(config: ModelConfig, seq_len: int, *, mixed: bool) -> int:
    """The masks of banded layers, (T, T) in the precision of queries for each layer; all sequences share them."""
    banded = sum(0 < config.window(layer) < seq_len for layer in range(config.depth))
    return banded * (2 if mixed else 4) * seq_len**2


def _norm(config: ModelConfig, fused: bool) -> int:
    """The input in fp32 and its statistics; without `fused` RMSNorm is made of parts, and keeps x / rms(x) too."""
    if config.norm == "layernorm":
        return 4 * config.hidden_size + 8
    return (4 if fused else 8) * config.hidden_size + 4


def _fused_layer(config: ModelConfig, element: int) -> int:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    turned = config.qk_norm or config.position == "rope"
    attention = (
        element * config.hidden_size  # input of the joined projection
        + element * (queries + 2 * keys)  # its output, of which values are a part
        + (4 * (config.num_heads + config.num_kv_heads) if config.qk_norm else 0)  # 1 / rms
        + (element * (queries + keys) if turned else 0)
        + element * queries  # output of attention, input of o_proj
        + 4 * config.num_heads  # log-sum-exp
    )
    inner = (3 if config.mlp == "swiglu" else 2) * config.intermediate_size
    return 2 * _norm(config, True) + attention + element * (config.hidden_size + inner)


def _plain_layer(config: ModelConfig, element: int) -> int:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Autocast makes a copy of the norm's output for each product that takes it; in fp32 all share it.
    inputs = (3 + (2 if config.mlp == "swiglu" else 1)) if element == 2 else 2
    attention = (
        (8 * (queries + keys) + 4 * (config.num_heads + config.num_kv_heads) if config.qk_norm else 0)
        + element * (queries + 2 * keys)  # what attention takes
        + element * queries
        + 4 * config.num_heads
    )
    inner = (4 if config.mlp == "swiglu" else 2) * config.intermediate_size
    return 2 * _norm(config, False) + attention + element * (inputs * config.hidden_size + inner)


def backward_bytes(config: ModelConfig, *, mixed: bool) -> int:
    """Of one token, what the widest layer's backward pass holds at once beside all activations: the gradient of the
    stream and of the layer's input in fp32, and those of the feed-forward network's inner values with one product."""
    config = config.resolved()
    inner = (4 if config.mlp == "swiglu" else 2) * config.intermediate_size
    return 3 * 4 * config.hidden_size + (2 if mixed else 4) * inner


def optimizer_bytes(model: Transformer, section: OptimizerSection) -> int:
    """AdamW keeps two fp32 values a parameter, Muon one."""
    sizes = {
        group["name"]: sum(parameter.numel() for parameter in group["params"])
        for group in parameter_groups(model, section)
    }
    return sum(size * (4 if section.name == "muon" and name == MATRICES else 8) for name, size in sizes.items())


def training_parts(
    model: Transformer,
    section: OptimizerSection,
    *,
    device_type: str,
    dtype: torch.dtype,
    compiled: bool,
    sequences: int,
    seq_len: int,
    accumulates: bool,
    recompute: bool,
) -> dict[str, int]:
    """Bytes on the training device by part. Their sum takes all to be held at once, as in a run that accumulates.

    Args:
        model: may be on the meta device.
        sequences: of a micro-batch.
        accumulates: a batch has several micro-batches, so the head's gradient exists twice.
        recompute: activation checkpointing.
    """
    config, mixed, tokens = model.config, dtype != torch.float32, sequences * seq_len
    parameters = model.num_parameters()["total"]
    fused = compiled or (device_type == "cpu" and dtype == torch.bfloat16)
    products = sum(p.numel() for name, p in model.blocks.named_parameters() if "norm" not in name)
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": optimizer_bytes(model, section),
        "weight_copies": 2 * products if mixed else 0,
        "activations": tokens * activation_bytes(config, mixed=mixed, fused=fused, recompute=recompute)
        + mask_bytes(config, seq_len, mixed=mixed),
        "logits": head_loss_bytes(
            tokens, config.hidden_size, config.vocab_size, device_type, dtype, accumulates=accumulates
        ),
        "backward": tokens * backward_bytes(config, mixed=mixed),
    }


def inference_parts(model: Transformer) -> dict[str, int]:
    """Bytes of the weights, and of keys and values of one sequence of max_seq_len, in bf16 and in fp32."""
    config, parameters = model.config, model.num_parameters()["total"]
    cached = 2 * config.depth * config.num_kv_heads * config.head_dim * config.max_seq_len
    return {
        "weights_bfloat16": 2 * parameters,
        "weights_float32": 4 * parameters,
        "cache_bfloat16": 2 * cached,
        "cache_float32": 4 * cached,
    }
