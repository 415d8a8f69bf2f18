"""Masks against numpy's integers, their statistics, and a training pass against one with the masks written out."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightlm.data.hashing import mix
from lightlm.model import fused
from lightlm.model.attention import build_mask
from lightlm.model.dropout import Dropout, drop
from lightlm.model.rotary import rotary_table
from lightlm.train.step.loss import token_losses
from tests.shapes import SHAPES, build

TOKENS, TARGETS = torch.randint(97, (2, 3, 10), generator=torch.Generator().manual_seed(0))
SAMPLES = torch.tensor([7, 8, 10**10])


def reference_mask(rate, seed, sample, site, length, channels):
    """True where a value is dropped, by unsigned integers of numpy."""
    with np.errstate(over="ignore"):
        key = mix(np.array([seed * 0x9E3779B97F4A7C15 % 2**64], dtype=np.uint64))
        key = mix(key + np.uint64(sample))
        rows = mix(key + np.uint64(site << 32) + np.arange(length, dtype=np.uint64)) >> np.uint64(32)
        bits = rows.astype(np.uint32)[:, None] + np.arange(channels, dtype=np.uint32)
        bits ^= bits >> np.uint32(16)
        bits *= np.uint32(0x85EBCA6B)
        bits ^= bits >> np.uint32(13)
        bits *= np.uint32(0xC2B2AE35)
    # The threshold is one of signed numbers.
    return bits.view(np.int32) < round(rate * 2**32) - 2**31


def masks(dropout, layers, length, channels):
    """Every site's mask, True where a value is dropped: (1 + 2 layers, B, T, D)."""
    ones = torch.ones(len(dropout.samples_B), length, channels)
    found = [dropout.embeddings(ones)]
    for branch in dropout.branches(layers, length):
        found += [drop(ones, keys, branch.rate) for keys in branch.keys_2BT]
    return torch.stack(found) == 0


@pytest.mark.parametrize(("rate", "seed"), [(0.1, 1337), (0.7, -5), (0.5, 2**63 - 1)])
def test_masks_are_those_of_unsigned_integers(rate, seed):
    ours = masks(Dropout(rate, seed, SAMPLES), 2, 9, 20)
    for site in range(5):
        for row, sample in enumerate(SAMPLES.tolist()):
            assert np.array_equal(ours[site, row], reference_mask(rate, seed, sample, site, 9, 20))


def test_rates_are_right_and_masks_independent():
    """Of any two samples, positions, channels, layers or branches, the share that both drop is the rate's square."""
    rate = 0.3
    dropped = masks(Dropout(rate, 1, torch.arange(64)), 4, 64, 64).double()
    count = dropped.numel()
    assert dropped.mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / count) ** 0.5)
    centered = dropped - rate
    for dim in range(4):
        for step in (1, 2, 3):
            covariance = (centered * centered.roll(step, dim)).mean().item()
            assert abs(covariance) < 4 * rate * (1 - rate) / count**0.5, (dim, step)
    other_seed = masks(Dropout(rate, 2, torch.arange(64)), 4, 64, 64).double() - rate
    assert abs((centered * other_seed).mean().item()) < 4 * rate * (1 - rate) / count**0.5


def test_kept_values_are_scaled_so_that_the_mean_stays():
    x = torch.randn(3, 10, 8, dtype=torch.float64)
    dropout = Dropout(0.25, 3, SAMPLES)
    dropped = masks(dropout, 0, 10, 8)[0]
    torch.testing.assert_close(dropout.embeddings(x), torch.where(dropped, 0.0, x / 0.75), rtol=1e-15, atol=0)


def written_out(model, tokens, dropout):
    """Hidden states with the masks multiplied in by hand, one layer after another."""
    config = model.config
    length = tokens.shape[1]
    keep = (~masks(dropout, config.depth, length, config.hidden_size)).double() / (1 - dropout.rate)
    positions = torch.arange(length)[None]
    x = config.embedding_scale * F.embedding(tokens, model.embed_tokens.weight)
    rotation = None
    if config.position == "learned":
        x = x + model.embed_positions(positions)
    else:
        cos, sin = rotary_table(positions, config)
        rotation = cos[:, None], sin[:, None]
    x = x * keep[0]
    for layer in range(config.depth):
        block = model.blocks[layer // config.layer_sharing]
        mask = build_mask(positions, length, config.window(layer), fresh=True, aligned=True)
        y = block.attention(block.attention_norm(x), rotation, mask)
        x = block.attention_residual(x, keep[1 + 2 * layer] * y)
        y = block.mlp(block.mlp_norm(x))
        x = block.mlp_residual(x, keep[2 + 2 * layer] * (y[0] if isinstance(y, tuple) else y))
    return model.norm(x)


@pytest.mark.parametrize("name", SHAPES)
def test_a_pass_applies_the_masks_to_embeddings_and_branches(name):
    model, dropout = build(name).double(), Dropout(0.2, 5, SAMPLES)
    ours = model.hidden_states(TOKENS, dropout=dropout)
    torch.testing.assert_close(ours, written_out(model, TOKENS, dropout), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours, model.hidden_states(TOKENS))


def gradients(model, dropout, *, dtype=None):
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        total = token_losses(model, TOKENS, TARGETS, dropout=dropout).loss
    (total / TARGETS.numel()).backward()
    return total.item(), {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", SHAPES)
def test_fused_layers_and_plain_ones_drop_the_same(name, monkeypatch):
    model, dropout = build(name), Dropout(0.2, 5, SAMPLES)
    fused_loss, ours = gradients(copy.deepcopy(model), dropout)
    low_loss, _ = gradients(copy.deepcopy(model), dropout, dtype=torch.bfloat16)
    monkeypatch.setattr(fused, "applies", lambda x: False)
    exact_loss, exact = gradients(model.double(), dropout)
    assert fused_loss == pytest.approx(exact_loss, rel=1e-6)
    assert low_loss == pytest.approx(exact_loss, rel=5e-3)
    for key, expected in exact.items():
        assert (ours[key] - expected).norm() < 1e-5 * expected.norm() + 1e-6, key


@pytest.mark.skipif(sys.platform != "linux", reason="needs a C++ compiler")
def test_compiled_blocks_have_the_same_gradients():
    """That of a residual scale sums over all values that a mask leaves: torch.compile makes masks in its loops."""
    plain, compiled, dropout = build("scaled"), build("scaled"), Dropout(0.2, 5, SAMPLES)
    compiled.compile_blocks()
    (loss, expected), (compiled_loss, found) = gradients(plain, dropout), gradients(compiled, dropout)
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["qwen3", "shared", "moe"])
def test_recomputed_blocks_drop_the_same(name):
    plain, recomputing, dropout = build(name), build(name), Dropout(0.2, 5, SAMPLES)
    recomputing.recompute_blocks = True
    first, second = gradients(plain, dropout), gradients(recomputing, dropout)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])


def test_a_sample_drops_the_same_in_any_batch():
    model = build("qwen3")
    whole = model.hidden_states(TOKENS, dropout=Dropout(0.2, 5, SAMPLES))
    for row in range(3):
        alone = model.hidden_states(TOKENS[row : row + 1], dropout=Dropout(0.2, 5, SAMPLES[row : row + 1]))
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-5, atol=1e-5)
