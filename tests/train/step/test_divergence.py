"""The divergence from a teacher against its formula in float64, with gradients by autograd."""

import pytest
import torch
import torch.nn.functional as F

from lightlm.train.step import loss as loss_module
from lightlm.train.step.divergence import Mix, TopTokens
from lightlm.train.step.loss import Lesson, token_loss, token_losses
from lightlm.train.step.teacher import Teacher
from tests.shapes import build

TOKENS = 95  # of 97 rows: both tables are larger than the tokenizer


@pytest.fixture
def batch():
    torch.manual_seed(3)
    return torch.randint(TOKENS, (3, 10)), torch.randint(TOKENS, (3, 10))


def teacher_of(name="gpt2", dtype=torch.float32):
    return Teacher(build(name, seed=1), TOKENS, dtype)


def reference(model, teacher_logits, inputs, targets, weight, temperature, z_loss=0.0, top=None):
    """Sums over the tokens with a target, in float64: objective, cross-entropy, T^2 KL."""
    trained = targets.flatten() >= 0
    z = model(inputs).flatten(0, 1)[trained]
    log_p = (teacher_logits[trained, :TOKENS] / temperature).log_softmax(-1)
    log_q = (z / temperature).log_softmax(-1)
    if top is None:
        kl = (log_p.exp() * (log_p - log_q[:, :TOKENS])).sum()
    else:  # the others are one outcome
        known, ids = log_p.exp().topk(top)
        q = log_q.exp()
        rest_p, rest_q = 1 - known.sum(-1), q.sum(-1) - q.gather(1, ids).sum(-1)
        kl = (known * (known.log() - log_q.gather(1, ids))).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    entropy = F.cross_entropy(z, targets.flatten()[trained], reduction="sum")
    scaled = temperature**2 * kl
    squares = z.logsumexp(-1).square().sum()
    return (1 - weight) * entropy + weight * scaled + z_loss * squares, entropy, scaled


def logits_of(teacher_model, inputs):
    with torch.no_grad():
        return teacher_model.double()(inputs).flatten(0, 1)


def assert_gradients(model, expected):
    for (key, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, atol=2e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [7, 256])
@pytest.mark.parametrize(("weight", "temperature", "z_loss"), [(0.5, 1.0, 0.0), (0.3, 2.5, 0.02), (1.0, 1.0, 0.0)])
def test_divergence_and_gradients_match_the_formula(name, rows, weight, temperature, z_loss, batch, monkeypatch):
    """Tied and untied heads, one and many chunks; some targets are not trained on."""
    monkeypatch.setitem(loss_module._CHUNK, "cpu", rows)
    monkeypatch.setattr(loss_module, "_SLICE_ELEMENTS", 3 * 97)
    monkeypatch.setattr(loss_module, "_SLICE_ROWS", 1)
    inputs, targets = batch
    targets[1, 2:6] = -100
    model, exact = build(name), build(name).double()
    lesson = Lesson(teacher_of()(inputs), Mix(weight, temperature))
    sums = token_losses(model, inputs, targets, z_loss=z_loss, masked=True, lesson=lesson)
    (sums.objective / 30).backward()
    logits = logits_of(build("gpt2", seed=1), inputs)
    objective, entropy, scaled = reference(exact, logits, inputs, targets, weight, temperature, z_loss)
    (objective / 30).backward()
    assert sums.objective.item() == pytest.approx(objective.item(), rel=1e-5)
    assert sums.loss.item() == pytest.approx(entropy.item(), rel=1e-6)
    assert sums.kl.item() == pytest.approx(scaled.item(), rel=1e-5)
    assert not sums.kl.requires_grad
    assert_gradients(model, exact)


@pytest.mark.parametrize(("top", "weight"), [(5, 0.5), (1, 1.0), (TOKENS, 0.7)])
def test_the_likeliest_tokens_match_the_formula(top, weight, batch, monkeypatch):
    """With the mass of the others, down to one token and up to all, where no mass is left."""
    monkeypatch.setitem(loss_module._CHUNK, "cpu", 7)
    inputs, targets = batch
    model, exact = build("qwen3"), build("qwen3").double()
    logits = logits_of(build("gpt2", seed=1), inputs)
    log_p, ids = logits[:, :TOKENS].log_softmax(-1).topk(top)
    rest = 1 - log_p.exp().sum(-1) if top < TOKENS else torch.zeros(len(log_p))
    lesson = Lesson(TopTokens(ids, log_p.float(), rest.log().float()), Mix(weight, 1.0))
    sums = token_losses(model, inputs, targets, z_loss=0.01, lesson=lesson)
    (sums.objective / 30).backward()
    objective, _, kl = reference(exact, logits, inputs, targets, weight, 1.0, 0.01, top if top < TOKENS else None)
    (objective / 30).backward()
    assert sums.kl.item() == pytest.approx(kl.item(), rel=1e-5)
    assert_gradients(model, exact)


def test_the_known_part_is_at_most_the_divergence(batch):
    inputs, targets = batch
    model, logits = build("llama"), logits_of(build("gpt2", seed=1), inputs)
    found = []
    for top in (1, 4, 16, 64):
        log_p, ids = logits[:, :TOKENS].log_softmax(-1).topk(top)
        parts = TopTokens(ids, log_p.float(), (1 - log_p.exp().sum(-1)).log().float())
        found.append(token_losses(model, inputs, targets, lesson=Lesson(parts, Mix(1.0, 1.0))).kl.item())
    whole = token_losses(model, inputs, targets, lesson=Lesson(teacher_of()(inputs), Mix(1.0, 1.0))).kl.item()
    assert found == sorted(found)
    assert found[-1] <= whole
    assert found[-1] == pytest.approx(whole, rel=0.15)


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_a_model_has_no_divergence_from_itself(name, batch):
    inputs, targets = batch
    lesson = Lesson(Teacher(build(name), 97, torch.float32)(inputs), Mix(0.5, 1.0))
    sums = token_losses(build(name), inputs, targets, lesson=lesson)
    assert abs(sums.kl.item()) < 1e-4
    assert sums.loss.item() == pytest.approx(token_loss(build(name), inputs, targets).item(), rel=1e-6)


@pytest.mark.parametrize("teacher", ["gpt2", "moe"])
def test_in_bfloat16_it_is_close(teacher, batch, monkeypatch):
    """Model and teacher, whose norms, tables and routers stay in fp32."""
    monkeypatch.setitem(loss_module._CHUNK, "cpu", 8)
    inputs, targets = batch
    model, exact = build("qwen3"), build("qwen3")
    expected = token_losses(exact, inputs, targets, lesson=Lesson(teacher_of(teacher)(inputs), Mix(0.5, 1.0)))
    rounded = teacher_of(teacher, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        sums = token_losses(model, inputs, targets, lesson=Lesson(rounded(inputs), Mix(0.5, 1.0)))
    sums.objective.backward()
    expected.objective.backward()
    assert rounded(inputs).x_NE.dtype == torch.bfloat16
    assert rounded.model.norm.weight.dtype == torch.float32
    assert sums.kl.item() == pytest.approx(expected.kl.item(), rel=2e-2)
    grad, close = model.lm_head.weight.grad, exact.lm_head.weight.grad
    assert (grad - close).norm() < 0.03 * close.norm()


def test_a_batch_without_targets_has_no_divergence(batch):
    inputs, targets = batch
    lesson = Lesson(teacher_of()(inputs), Mix(0.5, 1.0))
    sums = token_losses(build("llama"), inputs, torch.full_like(targets, -100), masked=True, lesson=lesson)
    sums.objective.backward()
    assert sums.kl.item() == sums.loss.item() == 0.0
