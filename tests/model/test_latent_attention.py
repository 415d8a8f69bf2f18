"""Multi-head latent attention: against the formula, and its three ways of computing against each other."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.model import attention as attention_module
from lightlm.model.attention import (
    LatentAttention,
    Mask,
    absorbs,
    attend_absorbed,
    attend_latents,
    build_mask,
)
from lightlm.model.config import LATENT_NORM_EPS, ModelConfig
from lightlm.model.counting import count_parameters
from lightlm.model.rotary import rotary_table
from lightlm.model.transformer import Transformer
from tests.shapes import SHAPES, build

LATENT = [name for name, shape in SHAPES.items() if shape.attention == "mla"]
SMALL = {"num_layers": 1, "hidden_size": 24, "num_heads": 3, "max_seq_len": 16}


def normalized(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def turned(x_TK, theta=10_000.0):
    """Each pair of channels (i, i + K/2) as a complex number, multiplied by exp(i angle)."""
    half = x_TK.shape[-1] // 2
    angles = torch.arange(len(x_TK), dtype=torch.float64)[:, None] / theta ** (torch.arange(half) / half)
    turned = torch.complex(x_TK[:, :half], x_TK[:, half:]) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("q_lora_rank", [0, 7])
def test_it_matches_the_papers_equations_in_float64(q_lora_rank):
    """DeepSeek-V2's equations 37 to 47, one query at a time."""
    config = ModelConfig(
        **SMALL, attention="mla", q_lora_rank=q_lora_rank, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=4,
        v_head_dim=6,
    ).resolved()  # fmt: skip
    torch.manual_seed(0)
    module = LatentAttention(config)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2.0)
    x_TD = torch.randn(11, 24)
    rotation = tuple(part[None, None] for part in rotary_table(torch.arange(11), config))
    weights = {name: parameter.detach().double() for name, parameter in module.named_parameters()}
    x = x_TD.double()
    queries = x
    if q_lora_rank:
        queries = normalized(x @ weights["q_a_proj.weight"].T, weights["q_a_norm.weight"], LATENT_NORM_EPS)
    q_THK = (queries @ weights["q_b_proj.weight" if q_lora_rank else "q_proj.weight"].T).view(11, 3, 9)
    latent = normalized(x @ weights["kv_a_proj.weight"].T, weights["kv_a_norm.weight"], LATENT_NORM_EPS)
    k_THN = (latent @ weights["k_b_proj.weight"].T).view(11, 3, 5)
    v_THV = (latent @ weights["v_b_proj.weight"].T).view(11, 3, 6)
    k_TR = turned(x @ weights["k_rope_proj.weight"].T)
    out = torch.zeros(11, 3, 6, dtype=torch.float64)
    for head in range(3):
        q_TR = turned(q_THK[:, head, 5:])
        for t in range(11):
            scores = k_THN[: t + 1, head] @ q_THK[t, head, :5] + k_TR[: t + 1] @ q_TR[t]
            out[t, head] = (scores / math.sqrt(9)).softmax(0) @ v_THV[: t + 1, head]
    expected = out.flatten(1) @ weights["o_proj.weight"].T
    for grad in (False, True):  # plain, and with the layers of `fused`
        with torch.set_grad_enabled(grad):
            mask = build_mask(torch.arange(11)[None], 11, 0, fresh=True, aligned=True)
            found = module(x_TD[None], rotation, mask)[0]
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(data=st.data())
def test_absorbed_projections_equal_the_plain_form(data):
    """For any sizes, numbers of new and old positions, and masks that show each query a key at least."""
    heads, nope, rope, value, rank, queries, before, batch = (
        data.draw(st.integers(1, most)) for most in (4, 9, 3, 9, 12, 6, 9, 3)
    )
    keys, rope = before + queries, 2 * rope
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, kept = normal(batch, heads, queries, nope + rope), normal(batch, 1, keys, rank + rope)
    k_b, v_b = normal(heads, nope, rank), normal(heads, value, rank)
    seen = torch.rand(batch, 1, queries, keys, generator=generator) < 0.5
    seen[..., 0] = True
    for mask in (Mask(), Mask(seen)):
        found = attend_absorbed(q, kept, k_b, v_b, mask)
        k = torch.einsum("bsl,hnl->bhsn", kept[:, 0, :, :rank], k_b)
        v = torch.einsum("bsl,hvl->bhsv", kept[:, 0, :, :rank], v_b)
        scores = q[..., :nope] @ k.mT + q[..., nope:] @ kept[:, :, :, rank:].mT
        if mask.allowed is not None:
            scores = scores.masked_fill(~mask.allowed, -torch.inf)
        expected = (scores / math.sqrt(nope + rope)).softmax(-1) @ v
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(attend_latents(q, kept, k_b, v_b, mask), expected)


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("absorbed", [False, True])
@settings(max_examples=10)
@given(cuts=st.lists(st.integers(1, 8), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_cache_gives_the_full_pass_in_both_ways(name, absorbed, cuts, seed):
    model = build(name)
    tokens_BT = torch.randint(97, (2, sum(cuts)), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention_module, "absorbs", lambda *_: absorbed)
        cache = model.new_cache(2)
        found = torch.cat([model(part, cache) for part in tokens_BT.split(cuts, 1)], 1)
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens_BT), atol=3e-5, rtol=1e-4)


def test_one_token_absorbs_and_a_prompt_does_not():
    weights = torch.empty(4, 64, 256), torch.empty(4, 64, 256)
    assert absorbs(1, 100, *weights, 32)
    assert absorbs(8, 1000, *weights, 32)
    assert not absorbs(100, 100, *weights, 32)
    assert not absorbs(1000, 2000, *weights, 32)


def test_the_cache_holds_latents_and_the_rotary_key_only():
    model = build("deepseek")
    cache = model.new_cache(3, 20)
    assert cache.pairs.shape == (2, 3, 1, 1, 20, 24 + 4)
    assert cache.keys.data_ptr() == cache.values.data_ptr()


@pytest.mark.parametrize("name", LATENT)
def test_counts_and_operations(name):
    """Attention's operations: 2 per multiplication of scores and of values, three times with gradients."""
    model = Transformer(SHAPES[name])
    assert count_parameters(SHAPES[name]) == model.num_parameters()
    config, length = model.config, 30
    visible = sum(min(config.window(layer) or length, length) for layer in range(config.depth))
    weights = sum(p.numel() for p in model.blocks.parameters()) - model._idle_parameters(model.blocks)
    attention = 3 * 2 * config.num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    expected = 6 * (weights * config.layer_sharing + model.head_weight.numel()) + attention * visible
    assert model.flops_per_token(length) == expected


def test_defaults_are_those_of_deepseek():
    shape = replace(SHAPES["llama"], attention="mla", hidden_size=512, num_heads=4, num_kv_heads=0).resolved()
    sizes = (shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim, shape.kv_lora_rank, shape.q_lora_rank)
    assert sizes == (128, 64, 128, 512, 0)
    assert shape.resolved() == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "learned"}, "position: must be rope with attention: mla"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim: must be even, is 3"),
        ({"num_kv_heads": 3}, "^num_kv_heads: has no meaning with attention: mla; leave it out or set 4"),
        ({"head_dim": 8}, "head_dim: is qk_nope_head_dim [+] qk_rope_head_dim, 12, with attention: mla"),
        ({"qk_norm": True}, "qk_norm: is not there with attention: mla"),
        ({"attention_gate": True}, "attention_gate: is not there with attention: mla"),
        ({"bias": True, "bias_in": "all"}, "bias: projections of attention: mla have no biases"),
        ({"attention": "gqa"}, "kv_lora_rank: has no effect without model.attention=mla; leave it out"),
        ({"kv_lora_rank": -1}, "kv_lora_rank: must be at least 0"),
        ({"qk_nope_head_dim": 0, "num_heads": 5}, "num_heads: 5 does not divide hidden_size 32; set qk_nope_head_dim"),
    ],
)
def test_what_does_not_combine_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SHAPES["mla"], **{"bias": False, "bias_in": "all"} | change).resolved()
