import numpy as np
import pytest
import torch

from lightlm.optim.groups import learning_rates, set_step
from lightlm.optim.section import StepSettings
from tests.optim.built import optimizer_for
from tests.shapes import build


def kinds(optimizer, model):
    """{parameter name: group name}"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["name"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_each_kind_of_parameter_has_its_rate_and_decay(optimizer, wrapped):
    settings = {
        "name": optimizer, "lr": 1.0, "embedding_lr": 2.0, "head_lr": 3.0, "scalar_lr": 4.0, "weight_decay": 0.5,
        "embedding_weight_decay": 0.25,
    }  # fmt: skip
    model = build("qwen3")
    assert not model.config.tie_embeddings
    outer = torch.nn.ModuleDict({"module": model}) if wrapped else model
    built = optimizer_for(outer, **settings)
    groups = {group["name"]: group for group in built.param_groups}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "matrices": (1.0, 0.5), "embedding": (2.0, 0.25), "head": (3.0, 0.25), "scalar": (4.0, 0.0),
    }  # fmt: skip
    found = kinds(built, model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["embed_tokens.weight"] == "embedding"
    assert found["lm_head.weight"] == "head"
    assert found["blocks.0.mlp.down_proj.weight"] == "matrices"
    assert found["norm.weight"] == "scalar"
    set_step(built, StepSettings(lr=0.5, weight_decay=0.5, momentum=None, batch_tokens=1))
    assert learning_rates(built) == {"lr": 0.5, "lr_embedding": 1.0, "lr_head": 1.5, "lr_scalar": 2.0}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.25, "embedding": 0.125, "head": 0.125, "scalar": 0.0,
    }  # fmt: skip


def test_positions_are_a_table_and_one_rate_is_logged_once():
    model = build("gpt2")
    optimizer = optimizer_for(model, lr=0.1)
    assert kinds(optimizer, model)["embed_positions.weight"] == "embedding"
    set_step(optimizer, StepSettings(lr=0.5, weight_decay=1.0, momentum=None, batch_tokens=1))
    assert learning_rates(optimizer) == {"lr": 0.05}


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon"])
def test_learned_scales_have_their_own_group_and_the_depth_scales_eps(name):
    """CompleteP, alpha = 1: AdamW's eps shrinks as branches do; rates and decays stay."""
    model = build("scaled_moe")
    settings = {"name": name, "lr": 1.0, "scalar_lr": 4.0, "multiplier_weight_decay": 0.01, "eps": 1e-6}
    optimizer = optimizer_for(model, **settings)
    found = kinds(optimizer, model)
    assert found["blocks.0.mlp.up_proj.row_multipliers"] == "multipliers"
    assert found["blocks.1.mlp.experts.up_proj_column_multipliers"] == "multipliers"
    assert found["blocks.1.mlp_residual.scale"] == "scalar"
    assert sum(group == "multipliers" for group in found.values()) == 2 * (2 * 4 + 3 + 2 * 3)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert (groups["multipliers"]["lr"], groups["multipliers"]["weight_decay"]) == (4.0, 0.01)
    assert groups["matrices"]["lr"] == 1.0
    by_adamw = [group["eps"] for group in groups.values() if name == "adamw" or group["name"] != "matrices"]
    assert by_adamw == [pytest.approx(1.5e-6)] * len(by_adamw)  # base_depth 3, 2 layers
    plain = optimizer_for(build("qwen3"), **settings | {"multiplier_weight_decay": 0.0})
    assert plain.param_groups[-1]["eps"] == 1e-6


def test_multipliers_share_the_betas_of_norms():
    groups = optimizer_for(build("scaled"), lr=0.1, scalar_betas=[0.8, 0.9]).param_groups
    assert {group["name"]: group["betas"] for group in groups if group["betas"] != (0.9, 0.95)} == {
        "scalar": (0.8, 0.9), "multipliers": (0.8, 0.9)
    }  # fmt: skip


def test_a_vector_without_a_pattern_is_refused():
    model = build("gpt2")
    model.register_parameter("temperature", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"parameter temperature is not a matrix; add its pattern to .*PATTERNS"):
        optimizer_for(model, lr=0.1)


def test_groups_leave_adamws_numbers_alone():
    """The same bits as one AdamW over two groups, decayed and not."""
    ours, theirs = build("gpt2"), build("gpt2")
    split = [p for p in theirs.parameters() if p.ndim >= 2], [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": split[0], "weight_decay": 0.1}, {"params": split[1], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    grouped = optimizer_for(ours, lr=1e-2)
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        plain.step()
        grouped.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def cautious_adamw(weight, gradients, lr, decay, betas, eps):
    """arXiv 2510.12402's rule in float64: x <- x - lr (u + decay [u x >= 0] x)."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        update = mean / (1 - betas[0] ** step) / (np.sqrt(square / (1 - betas[1] ** step)) + eps)
        weight = weight - lr * (update + decay * np.where(update * weight >= 0, weight, 0))
    return weight


def test_cautious_adamw_follows_the_papers_rule():
    """On a table and a head as on the matrices (of AdamW); norms do not decay."""
    model = build("qwen3")
    settings = {"lr": 0.05, "weight_decay": 0.5, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = optimizer_for(model, cautious=True, **settings)
    before = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    gradients = {name: [] for name in before}
    for _ in range(5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
            gradients[name].append(parameter.grad.double().numpy())
        optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.5 if parameter.ndim >= 2 else 0.0
        expected = cautious_adamw(before[name], gradients[name], 0.05, decay, (0.9, 0.95), 1e-8)
        # A mean gradient at the edge of fp32's sign may differ from float64's in a few of many elements.
        close = np.isclose(parameter.detach().double().numpy(), expected, atol=1e-5)
        assert close.mean() > 0.999, name
        full = cautious_adamw(before[name], gradients[name], 0.05, 0.0, (0.9, 0.95), 1e-8)
        assert decay == 0 or not np.allclose(expected, full, atol=1e-4)


def test_cautious_decay_does_nothing_where_the_update_grows_the_weight():
    for name in ("adamw", "muon"):
        model = build("qwen3")
        weight = model.blocks[0].mlp.up_proj.weight
        plain, decayed = [], []
        for cautious in (False, True):
            for decay, kept in ((0.0, plain), (0.5, decayed)):
                with torch.no_grad():
                    weight.copy_(torch.eye(*weight.shape))
                optimizer = optimizer_for(model, name=name, lr=0.1, weight_decay=decay, cautious=cautious and decay > 0)
                weight.grad = -torch.eye(*weight.shape)
                optimizer.step()
                kept.append(weight.detach().clone())
        assert torch.equal(decayed[1], plain[1]), name
        assert not torch.equal(decayed[0], plain[0]), name
