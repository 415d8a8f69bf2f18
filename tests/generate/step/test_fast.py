"""The fast step is held to the plain forward pass, for every architecture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.generate.step.fast import FastStep
from lightlm.model import products
from tests.shapes import SHAPES, build

MODELS = {name: build(name) for name in SHAPES}
STEPS = {name: FastStep(model) for name, model in MODELS.items()}


@torch.no_grad()
def logits_by_steps(model, step, tokens_BT, lengths):
    """Logits (B, T) of tokens after a prefix of each row, whose rows lie in cache rows of these lengths."""
    cache = model.new_cache(len(lengths))
    prefix = torch.randint(97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    model(prefix, cache, list(lengths))
    found = torch.stack([step(token_B[:, None], cache) for token_B in tokens_BT.T], dim=1)
    return prefix, cache, found


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), same=st.booleans(), seed=st.integers(0, 99))
def test_it_computes_what_the_forward_pass_computes(name, lengths, same, seed):
    if same:
        lengths = [lengths[0]] * len(lengths)
    model = MODELS[name]
    tokens_BT = torch.randint(97, (len(lengths), 4), generator=torch.Generator().manual_seed(seed))
    prefix, cache, found = logits_by_steps(model, STEPS[name], tokens_BT, lengths)
    assert cache.lengths == [length + 4 for length in lengths]
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = model(torch.cat((prefix[row, :length], tokens_BT[row]))[None])[0, length:]
        torch.testing.assert_close(found[row], expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("packs", [False, True])
def test_in_bf16_it_is_as_near_to_float64_as_the_plain_step(name, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(products, "packs", lambda *_: False)
    exact = build(name).double()
    model = build(name).bfloat16()
    tokens_BT = torch.randint(97, (3, 6), generator=torch.Generator().manual_seed(1))
    errors = []
    for step in (FastStep(model), lambda tokens, cache: model(tokens, cache)[:, -1]):
        prefix, _, found = logits_by_steps(model, step, tokens_BT, [5, 9, 2])
        for row, length in enumerate((5, 9, 2)):
            with torch.no_grad():
                expected = exact(torch.cat((prefix[row, :length], tokens_BT[row]))[None])[0, length:]
            errors.append((found[row].double() - expected).norm(dim=-1) / expected.norm(dim=-1))
    # The median, since rounding may change which experts a token is sent to.
    fast, plain = torch.stack(errors).view(2, -1).median(1).values
    assert fast <= 1.2 * plain


def test_its_cache_is_the_one_that_the_forward_pass_continues():
    model = MODELS["moe"]
    tokens_BT = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        cache = model.new_cache(1)
        STEPS["moe"](tokens_BT[:, :1], cache)
        STEPS["moe"](tokens_BT[:, 1:2], cache)
        torch.testing.assert_close(model(tokens_BT[:, 2:], cache), model(tokens_BT)[:, 2:], atol=5e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="slots"):
            STEPS["moe"](tokens_BT[:, :1], model.new_cache(1, 0))
