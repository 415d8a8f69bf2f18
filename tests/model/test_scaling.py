"""Learnable scales: their gradients and initial values, and that they change nothing until they are trained."""

from dataclasses import replace

import pytest
import torch

from lightlm.model.scaling import Linear, Scaled
from lightlm.model.transformer import Transformer
from lightlm.train.step.loss import token_loss
from tests.shapes import SHAPES

KINDS = ["rows", "columns", "both"]
LLAMA, QWEN3, MOE = SHAPES["llama"], SHAPES["qwen3"], SHAPES["moe"]


def scaled(kind, *shape):
    """A random weight with multipliers of a kind."""
    sizes = {"rows": shape[:-1], "columns": (*shape[:-2], shape[-1])}
    factors = [torch.rand(sizes[each]) + 0.5 if kind in (each, "both") else None for each in sizes]
    return Scaled(torch.randn(shape), *factors).each(lambda part: part.double().requires_grad_())


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_receiver(kind, shape):
    """Entry by entry it is row * weight * column, and the receiver spreads its gradient as autograd would."""
    part = scaled(kind, *shape)
    rows = torch.ones(shape[:-1]) if part.rows is None else part.rows
    columns = torch.ones((*shape[:-2], shape[-1])) if part.columns is None else part.columns
    expected = torch.einsum("...f,...fd,...d->...fd", rows.double(), part.weight, columns.double())
    torch.testing.assert_close(part.product(), expected)
    leaves, grad = [leaf for leaf in part if leaf is not None], torch.randn(shape).double()
    plain = torch.autograd.grad(part.product(), leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(part.receiver(), leaves, grad), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_computes_the_same_with_and_without_gradients(kind):
    layer = Linear(replace(LLAMA, multipliers=kind, bias=True), 32, 24, "mlp")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        decoded = layer(x)
    torch.testing.assert_close(layer(x), decoded)
    torch.testing.assert_close(decoded, x @ layer.scaled().product().T + layer.bias)


@pytest.mark.parametrize("shape", [LLAMA, MOE, SHAPES["gpt2"]])
def test_untrained_scales_change_nothing(shape):
    """Multipliers and scales begin at 1, and a model as deep as the base has a factor of 1."""
    tokens = torch.randint(97, (2, 12))
    torch.manual_seed(3)
    plain = Transformer(shape)
    torch.manual_seed(3)
    model = Transformer(replace(shape, multipliers="both", residual_scale=1.0, base_depth=2))
    assert model.num_parameters()["total"] > plain.num_parameters()["total"]
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))


def test_initial_values():
    config = replace(QWEN3, num_layers=6, residual_scale=0.25, qk_gain=1.2, base_depth=3, multipliers="rows")
    parameters = dict(Transformer(config).named_parameters())
    for block in range(6):
        assert parameters[f"blocks.{block}.attention_residual.scale"].tolist() == [0.25]
        assert parameters[f"blocks.{block}.mlp_residual.scale"].tolist() == [0.25]
        assert torch.equal(parameters[f"blocks.{block}.attention.q_norm.weight"], torch.full((16,), 1.2))
        assert set(parameters[f"blocks.{block}.mlp.up_proj.row_multipliers"].tolist()) == {1.0}
    assert set(parameters["norm.weight"].tolist()) == {1.0}


def test_the_depth_only_changes_the_factor_of_branches():
    """CompleteP: the same initial spread at any depth, and branches and eps that shrink with 1 / depth."""
    spreads = []
    for depth in (4, 16):
        torch.manual_seed(0)
        model = Transformer(replace(LLAMA, num_layers=depth, hidden_size=64, base_depth=4))
        weights = torch.cat([block.attention.o_proj.weight.flatten() for block in model.blocks])
        spreads.append(weights.std().item())
        assert model.blocks[0].mlp_residual.factor == model.eps_factor == 4 / depth
    assert spreads == [pytest.approx(0.02 / 8**0.5, rel=0.02)] * 2
    x, y = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    torch.testing.assert_close(model.blocks[0].attention_residual(x, y), x + y / 4)


def test_the_embedding_scale_multiplies_what_enters_the_first_block():
    model = Transformer(replace(SHAPES["gpt2"], embedding_scale=3.0))
    tokens, entering = torch.randint(97, (1, 9)), []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: entering.append(inputs[0]))
    model(tokens)
    torch.testing.assert_close(entering[0], 3 * model.embed_tokens(tokens) + model.embed_positions(torch.arange(9)))


@pytest.mark.parametrize("name", ["scaled", "scaled_moe"])
def test_recomputation_gives_the_same_gradients(name):
    torch.manual_seed(0)
    model = Transformer(SHAPES[name])
    found = []
    for recompute in (False, True):
        model.recompute_blocks = recompute
        model.zero_grad()
        token_loss(model, torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_problems():
    assert replace(LLAMA, residual_scale=0.0).problems() == []
    assert replace(LLAMA, residual_scale=-1.0).problems() == [
        ("residual_scale", "must be null or a number of at least 0, is -1.0")
    ]
    assert replace(LLAMA, embedding_scale=0.0, qk_gain=-1.0, base_depth=-1).problems() == [
        ("base_depth", "must be at least 0, is -1"),
        ("qk_gain", "must be a number above 0, is -1.0"),
        ("embedding_scale", "must be a number above 0, is 0.0"),
    ]
    assert replace(LLAMA, qk_gain=1.2).idle_given() == [
        ("qk_gain", "has no effect without model.qk_norm; leave it out")
    ]
    assert replace(QWEN3, qk_gain=1.2).idle_given() == []
