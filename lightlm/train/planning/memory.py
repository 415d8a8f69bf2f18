"""Memory that training and inference take, by part: counted from shapes, before anything is built.

Shapes: D hidden size, F intermediate size, H query heads, G key/value heads, K head size, T positions of a sequence.
"""

from typing import Literal

import torch

from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.recipe import OptimizerSection
from lightlm.train.optim.optimizers import MATRICES, parameter_groups
from lightlm.train.step.loss import head_loss_bytes

# Rows of experts on a CPU for each choice of a token: what pads loads that vary by a fifth of their mean.
_PADDING = 1.15


def activation_bytes(config: ModelConfig, *, mixed: bool, fused: bool, recompute: bool = False) -> int:
    """What autograd keeps of one token up to the head.

    Args:
        recompute: only the blocks' inputs are kept, and at the peak what one block makes anew.
        mixed: products run in 16 bits.
        fused: the hand-written gradients of `model/fused.py`; what torch.compile keeps depends on its version and is
            taken to be the same. Otherwise the plain operations as torch runs them on a CPU; CUDA's own RMSNorm keeps
            less, so there it is an upper bound. Mixed and not fused, experts are taken to be CUDA's grouped products.
    """
    config = config.resolved()
    element = 2 if mixed else 4
    layer = _fused_layer if fused else _plain_layer
    layers = {kind: count * layer(config, element, kind) for kind, count in _layers(config).items()}
    if recompute:
        widest = max(layer(config, element, kind) for kind in layers)
        return config.depth * 4 * config.hidden_size + widest + _norm(config, fused)
    return sum(layers.values()) + _norm(config, fused)


Kind = Literal["dense", "experts"]


def _layers(config: ModelConfig) -> dict[Kind, int]:
    """How many layers of each kind there are."""
    experts = sum(config.has_experts(block) for block in range(config.num_layers)) * config.layer_sharing
    counts: dict[Kind, int] = {"dense": config.depth - experts, "experts": experts}
    return {kind: count for kind, count in counts.items() if count}


def mask_bytes(config: ModelConfig, seq_len: int, *, mixed: bool) -> int:
    """The masks of banded layers, (T, T) in the precision of queries for each layer; all sequences share them."""
    banded = sum(0 < config.window(layer) < seq_len for layer in range(config.depth))
    return banded * (2 if mixed else 4) * seq_len**2


def _norm(config: ModelConfig, fused: bool) -> int:
    """The input in fp32 and its statistics; without `fused` RMSNorm is made of parts, and keeps x / rms(x) too."""
    if config.norm == "layernorm":
        return 4 * config.hidden_size + 8
    return (4 if fused else 8) * config.hidden_size + 4


def _fused_layer(config: ModelConfig, element: int, kind: Kind) -> int:
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
    # Of the feed-forward network, the input and what is within.
    if kind == "experts":
        inner = element * 3 * _shared_size(config) + _router(config, element) + _padded_experts(config, element)
    else:
        inner = element * (3 if config.mlp == "swiglu" else 2) * config.intermediate_size
    return 2 * _norm(config, True) + attention + element * config.hidden_size + inner


def _plain_layer(config: ModelConfig, element: int, kind: Kind) -> int:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    networks = _shared_size(config) if kind == "experts" else config.intermediate_size
    # Autocast makes a copy of the norm's output for each product that takes it; in fp32 all share it.
    inputs = (3 + ((2 if config.mlp == "swiglu" else 1) if networks else 0)) if element == 2 else 2
    attention = (
        (8 * (queries + keys) + 4 * (config.num_heads + config.num_kv_heads) if config.qk_norm else 0)
        + element * (queries + 2 * keys)  # what attention takes
        + element * queries
        + 4 * config.num_heads
    )
    inner = element * (4 if config.mlp == "swiglu" else 2) * networks
    if kind == "experts":
        inner += _router(config, element)
        inner += _grouped_experts(config) if element == 2 else _padded_experts(config, element)
    return 2 * _norm(config, False) + attention + element * inputs * config.hidden_size + inner


def _shared_size(config: ModelConfig) -> int:
    return config.num_shared_experts * config.moe_intermediate_size


def _router(config: ModelConfig, element: int) -> int:
    """In fp32: its input where that is a copy, logits and scores of all experts, sums over them; int64 choices."""
    chosen = config.num_experts_per_tok
    sums = 4 + (4 if config.router == "sigmoid" else 0)  # of the z-loss and of the balance loss
    weights = 8 * chosen + (4 * chosen + 4 if config.norm_topk_prob else 0)
    return (4 * config.hidden_size if element == 2 else 0) + 8 * config.num_experts + sums + weights


def _padded_experts(config: ModelConfig, element: int) -> int:
    """Gate and up of each row, with its choice and token; of each choice its row and weight."""
    rows = config.num_experts_per_tok * _PADDING
    return round(rows * (element * 2 * config.moe_intermediate_size + 16)) + 12 * config.num_experts_per_tok


def _grouped_experts(config: ModelConfig) -> int:
    """Of each choice, in 16 bits: the token, five inner values, the weight; and the order."""
    a_choice = 2 * (config.hidden_size + 5 * config.moe_intermediate_size + 1) + 8
    return config.num_experts_per_tok * a_choice


def backward_bytes(config: ModelConfig, *, mixed: bool) -> int:
    """Of one token, what the widest layer's backward pass holds at once beside all activations: the gradient of the
    stream and of the layer's input in fp32, and those of the feed-forward network's inner values with one product."""
    config = config.resolved()
    inner = {"dense": (4 if config.mlp == "swiglu" else 2) * config.intermediate_size}
    # Of each row of experts: five inner values, the gradients of its output and of its token.
    a_row = 5 * config.moe_intermediate_size + 2 * config.hidden_size
    inner["experts"] = round(config.num_experts_per_tok * _PADDING * a_row) + 4 * _shared_size(config)
    widest = max(inner[kind] for kind in _layers(config))
    return 3 * 4 * config.hidden_size + (2 if mixed else 4) * widest


def expert_gradient_bytes(config: ModelConfig, *, mixed: bool) -> int:
    """Gradients of one layer's experts as its backward pass makes them, before they are added to those there are."""
    config = config.resolved()
    weights = 3 * config.num_experts * config.moe_intermediate_size * config.hidden_size
    return weights * (6 if mixed else 4)


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
        "backward": tokens * backward_bytes(config, mixed=mixed) + expert_gradient_bytes(config, mixed=mixed),
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
