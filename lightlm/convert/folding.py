"""Fold learned scales into plain weights: the model computes the same, and any program can run it.

Each rule is exact. Sums are rounded in another order, so logits differ by rounding; the products are computed in
float64 and rounded once.

- A matrix becomes rows * weight * columns. Its bias is not multiplied.
- A residual branch writes through `o_proj` or `down_proj`: their weights and biases take its scale and the factor of
  CompleteP. Of a mixture of experts, every expert's `down_proj` and the shared one do.
- The token table takes the embedding's scale. A tied head then has scaled logits, so the weight and bias of the last
  norm are divided by it.
- `qk_gain` only sets initial weights.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightlm.checkpoint import LoadedModel, build_model, clean_state
from lightlm.model.config import ModelConfig
from lightlm.model.scaling import COLUMNS, ROWS, Scaled

# The largest accepted difference of logits computed in float64, relative to the largest logit: folded weights are
# rounded once to float32. Measured on trained tiny models with every scale: at most 7e-7 of logits near 3.
TOLERANCE = 1e-5
# What a branch's output passes through last, by the name of its scale; a model has some of them.
_WRITERS = {
    "attention_residual.scale": ("attention.o_proj.weight", "attention.o_proj.bias"),
    "mlp_residual.scale": (
        "mlp.down_proj.weight",
        "mlp.down_proj.bias",
        "mlp.experts.down_proj",
        "mlp.shared.down_proj.weight",
    ),
}


def fold(config: ModelConfig, state: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return `config.folded()` and the weights of that model, which computes what the given one does.

    Args:
        state: the tensors of a `Transformer` of this configuration; they are not changed.
    """
    plain = config.folded()
    if plain == config:
        return config, state
    values = {name: tensor for name, tensor in state.items() if not _is_scale(name)}
    precise = dict(values)
    for name, scaled in _matrices(state):
        precise[name] = scaled.each(Tensor.double).product()
    for block in range(config.num_layers):
        for scale_name, names in _WRITERS.items():
            scale = state.get(f"blocks.{block}.{scale_name}")
            factor = config.depth_factor * (1.0 if scale is None else scale.double().item())
            for name in (f"blocks.{block}.{name}" for name in names):
                if name in precise:
                    precise[name] = precise[name].double() * factor
    precise["embed_tokens.weight"] = precise["embed_tokens.weight"].double() * config.embedding_scale
    if config.tie_embeddings:
        for name in ("norm.weight", "norm.bias"):
            if name in precise:
                precise[name] = precise[name].double() / config.embedding_scale
    return plain, {name: tensor.to(values[name].dtype) for name, tensor in precise.items()}


def _is_scale(name: str) -> bool:
    return name.endswith((ROWS, COLUMNS, *_WRITERS))


def _matrices(state: dict[str, Tensor]) -> Iterator[tuple[str, Scaled]]:
    """Yield the name of each weight that has multipliers, and all three."""
    stems = {name.removesuffix(kind) for name in state for kind in (ROWS, COLUMNS) if name.endswith(kind)}
    for stem in sorted(stems):  # a module's name with a dot, or a stack's with an underscore
        name = f"{stem}weight" if stem.endswith(".") else stem.removesuffix("_")
        yield name, Scaled(state[name], state.get(stem + ROWS), state.get(stem + COLUMNS))


def as_plain(loaded: LoadedModel) -> LoadedModel:
    """Return a model without multipliers and scales that computes the same; the given one if it has none."""
    config = loaded.model.config
    if config.folded() == config:
        return loaded
    plain, state = fold(config, clean_state(loaded.model.state_dict()))
    return replace(loaded, model=build_model(plain, state, str(loaded.path)).eval())


@torch.no_grad()
def largest_difference(loaded: LoadedModel, plain: LoadedModel) -> tuple[float, float]:
    """Return the largest difference of the two models' logits in float64, and the largest logit."""
    tokens_BT = torch.arange(min(128, loaded.model.config.max_seq_len))[None] % loaded.tokenizer.vocab_size
    ours_BTV, theirs_BTV = (copy.deepcopy(each.model).cpu().double()(tokens_BT) for each in (loaded, plain))
    return (ours_BTV - theirs_BTV).abs().max().item(), ours_BTV.abs().max().item()
