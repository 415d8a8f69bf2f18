"""A folded model computes what the trained one does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.checkpoint import build_model
from lightlm.convert.folding import fold
from lightlm.model.config import FOLDABLE_FIELDS
from tests.shapes import SHAPES
from tests.trained import train

FEATURES = {
    "row multipliers": {"multipliers": "rows"},
    "column multipliers": {"multipliers": "columns"},
    "both multipliers": {"multipliers": "both"},
    "residual scale": {"residual_scale": 0.7},
    "QK gain": {"qk_norm": True, "qk_gain": 1.3},
    "embedding scale": {"embedding_scale": 5.0},
    "base depth": {"base_depth": 5},
}
FEATURES["all"] = {key: value for values in FEATURES.values() for key, value in values.items()}
KINDS = {"dense": SHAPES["llama"], "experts": SHAPES["moe"], "gpt2": SHAPES["gpt2"], "repeated": SHAPES["shared"]}


def largest_difference(model, dtype=torch.float32):
    config, state = fold(model.config, model.state_dict())
    plain = build_model(config, state, "the folded model").eval()
    tokens = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, folded = (each.to(dtype)(tokens) for each in (model, plain))
    assert logits.abs().max() > 0.5
    return (logits - folded).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_alone_and_all_together(feature, kind):
    config = replace(KINDS[kind], **FEATURES[feature])
    model = train(config)
    changed = [p for name, p in model.named_parameters() if name.endswith(("multipliers", "scale"))]
    assert all((p - (config.residual_scale or 1)).abs().max() > 0.01 or p.numel() == 1 for p in changed)
    assert largest_difference(model) < 1e-5


@settings(max_examples=30)
@given(st.data())
def test_any_combination_folds_exactly(data):
    """In float64 no rounding hides a wrong rule."""

    def pick(*values):
        return data.draw(st.sampled_from(values))

    config = replace(
        SHAPES[pick("gpt2", "gpt3", "llama", "qwen3", "relu2", "shared", "moe", "softmax_moe")],
        multipliers=pick("none", "rows", "columns", "both"),
        residual_scale=pick(None, 0.5, 1.0),
        embedding_scale=pick(1.0, 0.3, 9.0),
        base_depth=pick(0, 1, 7),
        attention_gate=pick(False, True),
        tie_embeddings=pick(True, False),
    )
    torch.manual_seed(pick(0, 1, 2))
    model = train(config, steps=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert largest_difference(model, torch.float64) < 1e-12 or config.num_experts
    assert largest_difference(model, torch.float64) < 1e-6  # routers round their scores to float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_foldable_field_is_tried_above():
    assert set(FOLDABLE_FIELDS) == set(FEATURES["all"]) - {"qk_norm"}


def test_a_plain_model_is_returned_as_it_is():
    model = train(SHAPES["llama"], steps=0)
    state = model.state_dict()
    assert fold(model.config, state) == (model.config, state)


def test_the_precision_of_each_tensor_stays():
    model = train(SHAPES["scaled_moe"], steps=0)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    half["blocks.1.mlp.router.selection_bias"] = half["blocks.1.mlp.router.selection_bias"].float()
    _, folded = fold(model.config, half)
    assert {name: tensor.dtype for name, tensor in folded.items()} == {name: half[name].dtype for name in folded}
