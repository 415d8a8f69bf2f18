"""Memory of a forward and backward pass, counted from a model's shape.

Shapes: D hidden size, F intermediate size, H query heads, G key/value heads, K head size, T positions of a sequence.
"""

from typing import Literal

from lightlm.model.attention import FLEX_HEAD_DIM
from lightlm.model.config import ModelConfig

# Rows of experts on a CPU per choice of a token, with the padding of loads that vary by a fifth of their mean.
_PADDING = 1.15


def activation_bytes(
    config: ModelConfig,
    *,
    mixed: bool,
    fused: bool,
    recompute: bool = False,
    dropout: bool = False,
    mtp_depth: int = 0,
) -> int:
    """Return the bytes that autograd keeps per token up to the output head.

    Args:
        mixed: matrix products run in 16 bits.
        fused: with the hand-written gradients of `model/fused.py`. What torch.compile keeps depends on its version; it
            is assumed to be the same. Otherwise with plain operations as torch runs them on a CPU: an upper bound on
            CUDA, whose RMSNorm keeps less. Mixed and not fused, experts are CUDA's grouped products.
        recompute: with activation checkpointing: the blocks' inputs, and what one block computes again at the peak.
        dropout: with its masks, one byte per value.
        mtp_depth: heads of multi-token prediction.
    """
    config = config.resolved()
    element = 2 if mixed else 4
    counts = _layers(config)
    mask = config.hidden_size * dropout
    layers = {kind: _layer(config, element, kind, fused) + 2 * mask for kind in counts}
    ends = mask + _norm(config, fused)
    # A head has the inputs of three norms, and joins two of their outputs.
    head = layers["experts" if "experts" in layers else "dense"] + 3 * _norm(config, fused)
    head += (2 * element + (0 if fused else 2 * element if mixed else 0)) * config.hidden_size
    if recompute:  # the inputs of a head are the states and the embeddings
        kept = (config.depth + 2 * mtp_depth) * 4 * config.hidden_size
        return kept + max([*layers.values(), *[head] * (mtp_depth > 0)]) + ends
    return sum(counts[kind] * layers[kind] for kind in counts) + mtp_depth * head + ends


Kind = Literal["dense", "experts"]


def _layers(config: ModelConfig) -> dict[Kind, int]:
    """Return the number of layers of each kind."""
    experts = sum(config.has_experts(block) for block in range(config.num_layers)) * config.layer_sharing
    counts: dict[Kind, int] = {"dense": config.depth - experts, "experts": experts}
    return {kind: count for kind, count in counts.items() if count}


def mask_bytes(config: ModelConfig, seq_len: int, *, mixed: bool, mtp_depth: int = 0) -> int:
    """Return the bytes of the banded layers' masks, (T, T) each in the precision of queries; sequences share them."""
    banded = sum(0 < config.window(layer) < seq_len for layer in range(config.depth + mtp_depth))
    return banded * (2 if mixed else 4) * seq_len**2


def document_mask_bytes(
    config: ModelConfig,
    seq_len: int,
    sequences: int,
    *,
    mixed: bool,
    device_type: str,
    compiled: bool,
    recompute: bool,
    mtp_depth: int = 0,
) -> int:
    """Return the bytes that `data.document_mask` adds to the activations, the banded layers' masks included.

    See `build_document_mask` for its ways. One document may fill each sequence.
    """
    windows = [config.window(layer) for layer in range(config.depth + mtp_depth)]
    element, scores = 2 if mixed else 4, sequences * seq_len**2
    if device_type == "cpu" and not compiled:
        banded = sum(0 < window < seq_len for window in windows)
        joined = sequences * seq_len * config.num_heads * _padded(config)  # the outputs of all documents
        return element * ((1 if recompute else len(windows)) * joined + banded * scores)
    if device_type == "cuda" and compiled and config.head_dim >= FLEX_HEAD_DIM:
        return 0
    return element * len(set(windows)) * scores


def _norm(config: ModelConfig, fused: bool) -> int:
    """Count the input in fp32 and its statistics. Without `fused`, RMSNorm also keeps x / rms(x)."""
    if config.norm == "layernorm":
        return 4 * config.hidden_size + 8
    return (4 if fused else 8) * config.hidden_size + 4


def _padded(config: ModelConfig) -> int:
    """Return the width of a head in attention: keys and values of latent attention are padded to the wider one."""
    return max(config.head_dim, config.value_dim)


def _latent_attention(config: ModelConfig, element: int, fused: bool) -> int:
    """Count what latent attention keeps, besides its input."""
    heads, latents = config.num_heads, config.kv_lora_rank + config.q_lora_rank
    joined = (config.q_lora_rank or heads * config.head_dim) + config.kv_lora_rank + config.rotary_dim
    normed = element * (joined + latents) if fused else (8 + element) * latents
    # Queries, keys, values and output, and the output without its padding, which is the input of o_proj.
    return (
        normed
        + element * heads * (4 * _padded(config) + config.v_head_dim)
        + 4 * (heads + 1 + (config.q_lora_rank > 0))
    )


def _attention(config: ModelConfig, element: int, fused: bool) -> int:
    """Count what attention with grouped queries keeps, besides its input."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if fused:
        normed = element * (queries + keys) if config.qk_norm or config.position == "rope" else 0
    else:
        normed = 8 * (queries + keys) if config.qk_norm else 0
    return (
        element * (2 * queries + 2 * keys)  # its input, and its output, which is the input of o_proj
        + normed  # queries and keys before their norm and rotation
        + (4 * (config.num_heads + config.num_kv_heads) if config.qk_norm else 0)  # 1 / rms
        + 4 * config.num_heads  # log-sum-exp
        + (2 * element * queries if config.attention_gate else 0)  # the gate, and the gated output
    )


def _layer(config: ModelConfig, element: int, kind: Kind, fused: bool) -> int:
    gated, copied = config.mlp == "swiglu", element == 2 and not fused
    size = _shared_size(config) if kind == "experts" else config.intermediate_size
    # Autocast copies the norm's output for each product that takes it; otherwise all products share it.
    inputs = 3 + config.attention_gate + (1 + gated if size else 0) if copied else 2
    attention = (_latent_attention if config.attention == "mla" else _attention)(config, element, fused)
    inner = element * ((3 if fused else 4) if gated else 2) * size
    if kind == "experts":
        inner += _routed(config, element, grouped=copied)
    branches = 0 if config.residual_scale is None else 2  # outputs that a scale multiplies
    return 2 * _norm(config, fused) + element * (inputs + branches) * config.hidden_size + attention + inner


def _shared_size(config: ModelConfig) -> int:
    return config.num_shared_experts * config.moe_intermediate_size


def _routed(config: ModelConfig, element: int, *, grouped: bool) -> int:
    """Count what a router and its experts keep."""
    chosen, size = config.num_experts_per_tok, config.moe_intermediate_size
    router = (
        (4 * config.hidden_size if element == 2 else 0)  # its fp32 input, where that is a copy
        + 8 * config.num_experts  # logits and scores
        + 8 * chosen  # int64 choices
        + (4 * chosen + 4 if config.norm_topk_prob else 0)
        + (8 if config.router == "sigmoid" else 4)  # sums of the z-loss and of the balance loss
    )
    if grouped:  # per choice, in 16 bits, the token, five inner values and the weight; and its place in the order
        return router + chosen * (2 * (config.hidden_size + 5 * size + 1) + 8)
    # Gate and up of each row with its choice and token, and the row and weight of each choice.
    return router + round(chosen * _PADDING * (element * 2 * size + 16)) + 12 * chosen


def backward_bytes(config: ModelConfig, *, mixed: bool) -> int:
    """Return the bytes per token that the widest layer's backward pass holds beside all activations.

    These are the gradients of the stream and of the layer's input in fp32, and those of the feed-forward network's
    inner values with one product.
    """
    config = config.resolved()
    inner = {"dense": (4 if config.mlp == "swiglu" else 2) * config.intermediate_size}
    # Five inner values, the gradient of the output and that of the token, per row of experts.
    per_row = 5 * config.moe_intermediate_size + 2 * config.hidden_size
    inner["experts"] = round(config.num_experts_per_tok * _PADDING * per_row) + 4 * _shared_size(config)
    widest = max(inner[kind] for kind in _layers(config))
    return 3 * 4 * config.hidden_size + (2 if mixed else 4) * widest


def expert_gradient_bytes(config: ModelConfig, *, mixed: bool) -> int:
    """Return the bytes of one layer's gradients of experts, before they are added to those of earlier passes."""
    config = config.resolved()
    weights = 3 * config.num_experts * config.moe_intermediate_size * config.hidden_size
    return weights * (6 if mixed else 4)
