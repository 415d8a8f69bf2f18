"""Time of a training step on an accelerator, from its data sheet: each operation is bound by arithmetic or by memory.

An operation takes as long as its arithmetic at a share of the peak, or as the bytes that it moves at a share of the
bandwidth, whichever is longer (the roofline model, https://doi.org/10.1145/1498765.1498785). So small hidden sizes and
small batches reach a lower share of the peak than large ones. The two shares are assumptions, not measured on a GPU.
"""

from lightlm.device import Accelerator
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe
from lightlm.train.step.activations import activation_bytes

COMPUTE_SHARE, BANDWIDTH_SHARE = 0.6, 0.7
_ELEMENT = 2  # bytes of an operand of a product, in 16 bits
_PRODUCTS = 3  # a product, and its gradients of both operands
_FORWARD = 1  # only the product, where blocks are computed again in the backward pass
_LOGIT_PASSES = 5  # times that a logit is read or written: by the product, the softmax and the gradients
_ACTIVATION_PASSES = 3  # an activation is written, read in the backward pass, and has a gradient
_UPDATE_BYTES = 28  # per parameter: AdamW reads four fp32 values, and writes all but the gradient


def step_seconds(gpu: Accelerator, recipe: Recipe, model: Transformer, sequences: int) -> float:
    """Return the time of an optimizer step.

    Args:
        model: may be on the meta device.
        sequences: sequences per micro-batch.
    """
    config, tokens = model.config, sequences * recipe.seq_len
    flops_rate, byte_rate = COMPUTE_SHARE * gpu.peak, BANDWIDTH_SHARE * gpu.bandwidth

    def product(rows: int, inner: int, outer: int, count: int = 1, times: int = _PRODUCTS) -> float:
        """Return the time of `count` products of (rows, inner) and (inner, outer), and of their gradients."""
        arithmetic = 2 * count * rows * inner * outer
        moved = _ELEMENT * count * (rows * inner + rows * outer + inner * outer)
        return times * max(arithmetic / flops_rate, moved / byte_rate)

    seconds = 0.0
    depth = len(model.mtp)
    again = _FORWARD if recipe.train.activation_checkpointing else 0
    for part, repeats in ((model.blocks, config.layer_sharing), (model.mtp, 1)):
        for parameter in part.parameters():
            shape = parameter.shape
            if len(shape) == 2:
                seconds += repeats * product(tokens, shape[1], shape[0], times=_PRODUCTS + again)
            elif len(shape) == 3:  # stacked experts
                rows = max(tokens * config.num_experts_per_tok // shape[0], 1)
                seconds += repeats * product(rows, shape[1], shape[2], shape[0], times=_PRODUCTS + again)
    windows = (config.window(layer) for layer in range(config.depth + depth))
    # Fused attention skips the masked half of a causal layer; with a window it computes all scores and hides some.
    computed = sum(recipe.seq_len if 0 < window < recipe.seq_len else recipe.seq_len / 2 for window in windows)
    width = config.num_heads * (config.head_dim + config.value_dim)
    seconds += tokens * 2 * (_PRODUCTS + again) * width * computed / flops_rate
    activations = tokens * activation_bytes(config, mixed=True, fused=True, mtp_depth=depth)
    seconds += _ACTIVATION_PASSES * activations / byte_rate
    seconds += (1 + depth) * product(tokens, config.hidden_size, config.vocab_size)
    seconds += (1 + depth) * (_LOGIT_PASSES - _PRODUCTS) * _ELEMENT * tokens * config.vocab_size / byte_rate
    passes = recipe.batch_sequences / sequences
    # A GPU runs an update once per step, whatever the number of passes.
    parameters = model.num_parameters()["total"] + model.mtp_parameters
    return passes * seconds + _UPDATE_BYTES * parameters / byte_rate
