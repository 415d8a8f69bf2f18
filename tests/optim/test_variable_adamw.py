"""AdamW whose beta2 changes between steps, against its formula in float64."""

import copy
import math

import numpy as np
import pytest
import torch

from lightlm.optim.groups import set_step
from lightlm.optim.section import StepSettings
from lightlm.optim.state import load_named_state, named_state
from lightlm.optim.variable_adamw import VariableAdamW
from tests.optim.built import optimizer_for
from tests.shapes import build

BATCHES = (256, 256, 512, 1024, 4096, 4096)
HALF_LIFE = 10_000


def adamw(weight, gradients, beta2s, *, lr, decay, beta1=0.9, eps=1e-8, cautious=False):
    """The moments as sums over all steps, with the weights of each squared gradient written out."""
    for step in range(1, len(gradients) + 1):
        past = gradients[:step]
        mean = sum((1 - beta1) * beta1 ** (step - 1 - i) * g for i, g in enumerate(past)) / (1 - beta1**step)
        shares = [(1 - beta2s[i]) * math.prod(beta2s[i + 1 : step]) for i in range(step)]
        square = sum(share * g**2 for share, g in zip(shares, past, strict=True)) / sum(shares)
        update = mean / (np.sqrt(square) + eps)
        decayed = np.where(update * weight >= 0, weight, 0) if cautious else weight
        weight = weight - lr * decay * decayed - lr * update
    return weight


def step_of(tokens):
    return StepSettings(lr=1.0, weight_decay=1.0, momentum=None, batch_tokens=tokens)


def take_steps(model, optimizer, gradients, batches):
    for tokens, step in zip(batches, gradients, strict=True):
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        set_step(optimizer, step_of(tokens))
        optimizer.step()


def random_gradients(model, steps, seed=0, size=1e-3):
    generator = torch.Generator().manual_seed(seed)
    return [[size * torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(steps)]


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])  # the second is as large as the gradients
def test_a_half_life_in_tokens_follows_the_batch_with_the_exact_bias_correction(cautious, eps):
    """arXiv 2507.07101: beta2 = 0.5 ** (batch / half-life)."""
    model = build("qwen3")
    optimizer = optimizer_for(
        model, lr=0.05, weight_decay=0.5, eps=eps, beta2_half_life=HALF_LIFE, cautious=cautious,
        embedding_betas=[0.8, None], head_betas=[0.9, 0.99],
    )  # fmt: skip
    names = {id(p): group["name"] for group in optimizer.param_groups for p in group["params"]}
    before = [p.detach().double().numpy() for p in model.parameters()]
    gradients = random_gradients(model, len(BATCHES))
    take_steps(model, optimizer, gradients, BATCHES)
    by_tokens = [0.5 ** (tokens / HALF_LIFE) for tokens in BATCHES]
    for index, (name, parameter) in enumerate(model.named_parameters()):
        group = names[id(parameter)]
        own = [step[index].double().numpy() for step in gradients]
        expected = adamw(
            before[index], own, [0.99] * len(BATCHES) if group == "head" else by_tokens, lr=0.05, eps=eps,
            decay=0.0 if group == "scalar" else 0.5, beta1=0.8 if group == "embedding" else 0.9, cautious=cautious,
        )  # fmt: skip
        close = np.isclose(parameter.detach().double().numpy(), expected, atol=2e-5)
        assert close.mean() > (0.999 if cautious else 0.99999), name  # a sign may differ at the edge of fp32


def test_equal_batches_are_torchs_adamw_with_that_beta2():
    ours, theirs = build("gpt2"), build("gpt2")
    optimizer = optimizer_for(ours, lr=1e-2, beta2_half_life=3459)
    groups = [{"params": [p for p in theirs.parameters() if keep(p)], "weight_decay": decay}
              for keep, decay in ((lambda p: p.ndim >= 2, 0.1), (lambda p: p.ndim < 2, 0.0))]  # fmt: skip
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.5 ** (256 / 3459)), eps=1e-8, fused=True)
    gradients = random_gradients(ours, 5)
    take_steps(ours, optimizer, gradients, [256] * 5)
    for step in gradients:
        for parameter, gradient in zip(theirs.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_betas_of_groups_reach_their_groups_only():
    model = build("qwen3")
    settings = {"embedding_betas": [0.8, 0.995], "head_betas": [0.8, 0.96], "scalar_betas": [0.7, 0.9]}
    for name in ("adamw", "muon"):
        groups = {g["name"]: g for g in optimizer_for(model, name=name, lr=1e-3, **settings).param_groups}
        found = {key: group["betas"] for key, group in groups.items() if "betas" in group}
        expected = {"embedding": (0.8, 0.995), "head": (0.8, 0.96), "scalar": (0.7, 0.9)}
        assert found == expected | ({"matrices": (0.9, 0.95)} if name == "adamw" else {})


def test_saved_state_continues_bit_for_bit_and_may_take_another_half_life():
    model, other = build("gpt2"), build("gpt2")
    gradients = random_gradients(model, len(BATCHES))
    first, second = (optimizer_for(m, lr=1e-2, beta2_half_life=HALF_LIFE) for m in (model, other))
    take_steps(model, first, gradients, BATCHES)
    take_steps(other, second, gradients[:3], BATCHES[:3])
    resumed = optimizer_for(other, lr=1e-2, beta2_half_life=HALF_LIFE)
    load_named_state(other, resumed, copy.deepcopy(named_state(other, second)))
    take_steps(other, resumed, gradients[3:], BATCHES[3:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    (passed,) = {state["half_lives"] for state in resumed.state.values()}
    assert passed == pytest.approx(sum(BATCHES) / HALF_LIFE)
    changed = optimizer_for(other, lr=1e-2, beta2_half_life=2 * HALF_LIFE)
    load_named_state(other, changed, named_state(other, resumed))
    take_steps(other, changed, gradients[:1], [1000])
    assert changed.state[other.embed_tokens.weight]["half_lives"] == pytest.approx((sum(BATCHES) + 500) / HALF_LIFE)


def test_a_batch_of_thousands_of_half_lives_has_only_its_own_squares_in_the_second_moment():
    """0.5 ** (4096 / 1) is 0 in float64."""
    model = build("gpt2")
    optimizer = optimizer_for(model, lr=0.5, weight_decay=0.0, betas=[0.0, None], beta2_half_life=1)
    before = model.embed_tokens.weight.detach().clone()
    (gradients,) = random_gradients(model, 1)
    for _ in range(2):
        take_steps(model, optimizer, [gradients], [4096])
    gradient = model.embed_tokens.weight.grad
    moved = before - model.embed_tokens.weight
    assert torch.allclose(moved[gradient.abs() > 1e-5], gradient.sign()[gradient.abs() > 1e-5], atol=2e-3)


def test_a_run_that_had_a_fixed_beta2_continues_without_a_correction():
    """Its second moment is settled: the divisor is 1."""
    weight = torch.nn.Parameter(torch.zeros(1))
    fixed = torch.optim.AdamW([weight], betas=(0.0, 0.5), weight_decay=0.0, fused=True)
    for _ in range(30):
        weight.grad = torch.ones(1)
        fixed.step()
    group = {"params": [weight], "betas": (0.0, 0.9), "weight_decay": 0.0, "beta2_half_life": 1, "lr": 1.0}
    optimizer = VariableAdamW([group], cautious=False, fused=True)
    optimizer.state[weight] = fixed.state[weight]
    before, weight.grad = weight.item(), torch.ones(1)
    optimizer.step()
    assert before - weight.item() == pytest.approx(1.0, rel=1e-5)
