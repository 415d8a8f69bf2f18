"""Routers and the layer around them, against float64 formulas."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightlm import checkpoint
from lightlm.data.tokenizer import train_tokenizer
from lightlm.model import experts, transformer
from lightlm.model.config import ModelConfig
from lightlm.model.experts import keep_padding_uncompiled
from lightlm.model.moe import MoE, Router, batch_balance_loss, sequence_balance_loss
from lightlm.model.transformer import Block, Transformer
from tests.optim.built import optimizer_for
from tests.shapes import SHAPES, build

CONFIG = ModelConfig(
    num_layers=1, hidden_size=16, num_heads=2, max_seq_len=16, vocab_size=97, num_experts=6, num_experts_per_tok=3
).resolved()
TOKENS, TARGETS = torch.randint(97, (2, 3, 12), generator=torch.Generator().manual_seed(2)).unbind()


def build_router(seed=0, **changes):
    torch.manual_seed(seed)
    router = Router(replace(CONFIG, **changes))
    torch.nn.init.normal_(router.weight)
    if router.selection_bias is not None:
        router.selection_bias.normal_(std=0.3)
    return router


def expected_routing(router, x_ND):
    """Ids in ascending order, their weights, all scores: as in DESIGN.md, in float64."""
    logits_NE = x_ND.double() @ router.weight.detach().double().T
    if router.kind == "sigmoid":
        scores_NE = 1 / (1 + torch.exp(-logits_NE))
        choice_NE = scores_NE + router.selection_bias.double()
    else:
        scores_NE = torch.exp(logits_NE) / torch.exp(logits_NE).sum(-1, keepdim=True)
        choice_NE = scores_NE
    ids_NK = choice_NE.argsort(descending=True)[:, : router.chosen].sort().values
    weights_NK = torch.stack([scores_NE[n, ids] for n, ids in enumerate(ids_NK)])
    if router.normalized:
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    return ids_NK, weights_NK * router.scaling, scores_NE


def by_id(ids_NK, weights_NK):
    ids_NK, order_NK = ids_NK.sort()
    return ids_NK, weights_NK.gather(1, order_NK)


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("situation", ["fp32", "autocast", "bf16 model"])
def test_choices_and_weights_follow_the_formula(kind, normalized, scaling, situation):
    router = build_router(router=kind, norm_topk_prob=normalized, routed_scaling_factor=scaling)
    x_ND = torch.randn(40, 16)
    if situation == "bf16 model":
        router, x_ND = router.bfloat16(), x_ND.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=situation == "autocast"):
        ids_NK, weights_NK, scores_NE, logits_NE = router(x_ND)
    assert {weights_NK.dtype, scores_NE.dtype, logits_NE.dtype} == {torch.float32}
    expected_ids, expected_weights, expected_scores = expected_routing(router, x_ND)
    ids_NK, weights_NK = by_id(ids_NK, weights_NK)
    assert torch.equal(ids_NK, expected_ids)
    # Far below the rounding of bf16, 4e-3.
    torch.testing.assert_close(weights_NK.double(), expected_weights, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(scores_NE.double(), expected_scores, atol=1e-6, rtol=1e-5)


def test_the_bias_decides_the_choice_and_nothing_else():
    router, x_ND = build_router(), torch.randn(200, 16)
    router.selection_bias.zero_()
    before_ids, before = by_id(*router(x_ND)[:2])
    router.selection_bias[2] = -10.0
    router.selection_bias[4] = 10.0
    ids_NK, weights_NK = by_id(*router(x_ND)[:2])
    assert not (ids_NK == 2).any()
    assert (ids_NK == 4).any(-1).all()
    scores_NE = router(x_ND)[2]
    chosen_NK = scores_NE.gather(1, ids_NK)
    torch.testing.assert_close(weights_NK, chosen_NK / chosen_NK.sum(-1, keepdim=True))
    same = (ids_NK == before_ids).all(-1)
    assert 0 < same.sum() < 200
    torch.testing.assert_close(weights_NK[same], before[same])  # except for the order of their sum


def test_a_bias_that_is_equal_for_all_changes_nothing():
    model = build("moe")
    before = model(TOKENS)
    model.blocks[1].mlp.router.selection_bias += 1.0
    torch.testing.assert_close(model(TOKENS), before)


def test_the_bias_is_a_buffer_without_gradient():
    model = build("moe")
    name = "blocks.1.mlp.router.selection_bias"
    assert name in model.state_dict()
    assert name not in dict(model.named_parameters())
    model.hidden_states(TOKENS, routings=(routings := [])).sum().backward(retain_graph=True)
    (routings[0].balance + routings[0].z).backward()
    bias = model.get_buffer(name)
    assert not bias.requires_grad
    assert bias.grad is None
    assert not any(name.endswith("bias") for name in build("softmax_moe").state_dict())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_neither_move_nor_decay_the_bias(name):
    model = build("moe")
    before = model.blocks[1].mlp.router.selection_bias.clone()
    optimizer = optimizer_for(model, name=name, lr=0.1, weight_decay=1.0)
    assert not any(p is model.blocks[1].mlp.router.selection_bias for g in optimizer.param_groups for p in g["params"])
    weight = model.blocks[1].mlp.router.weight.clone()
    model(TOKENS).logsumexp(-1).sum().backward()
    optimizer.step()
    assert torch.equal(model.blocks[1].mlp.router.selection_bias, before)
    assert not torch.equal(model.blocks[1].mlp.router.weight, weight)


CASTS = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "to like a tensor": lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)),
    "only a block": lambda model: model.blocks[1].bfloat16() and model,
    "a copy": lambda model: copy.deepcopy(model).bfloat16(),
    "there and back": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_bias_stays_fp32_in_any_precision(cast):
    model = build("moe")
    before = model.blocks[1].mlp.router.selection_bias.clone()
    after = CASTS[cast](model).blocks[1].mlp.router.selection_bias
    assert after.dtype == torch.float32
    assert torch.equal(after, before)


def test_the_bias_stays_fp32_in_a_loaded_model(tmp_path):
    model = build("moe")
    checkpoint.save_model(tmp_path / "model", model, train_tokenizer(["some text, and some more text"] * 3, 300))
    loaded = checkpoint.load_model(tmp_path / "model", dtype=torch.bfloat16).model
    assert loaded.blocks[1].mlp.router.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.blocks[1].mlp.router.selection_bias, model.blocks[1].mlp.router.selection_bias)
    assert torch.equal(loaded(TOKENS), model.bfloat16()(TOKENS))


@pytest.mark.parametrize("shared", [0, 2])
def test_the_layer_is_the_weighted_sum_and_the_shared_experts(shared):
    config = replace(CONFIG, num_shared_experts=shared, routed_scaling_factor=2.0).resolved()
    torch.manual_seed(0)
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BTD = torch.randn(2, 7, 16)
    y_BTD, _ = layer(x_BTD)
    ids_NK, weights_NK, _ = expected_routing(layer.router, x_BTD.flatten(0, 1))
    expected_ND = []
    for x, ids, weights in zip(x_BTD.double().flatten(0, 1), ids_NK, weights_NK, strict=True):
        networks = [
            tuple(p[e].double() for p in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj))
            for e in ids
        ]
        outputs = [down @ (F.silu(gate @ x) * (up @ x)) for gate, up, down in networks]
        expected_ND.append(sum(w * output for w, output in zip(weights, outputs, strict=True)))
    expected_BTD = torch.stack(expected_ND).view(2, 7, 16)
    if shared:
        inner = shared * config.moe_intermediate_size
        assert layer.shared.gate_proj.weight.shape == (inner, 16)
        gate, up, down = (p.double() for p in layer.shared.parameters())
        expected_BTD = expected_BTD + (F.silu(x_BTD.double() @ gate.T) * (x_BTD.double() @ up.T)) @ down.T
    torch.testing.assert_close(y_BTD.double(), expected_BTD, atol=1e-5, rtol=1e-4)


def routed(kind):
    """A router's float64 logits as a leaf, and its choices as one-hot (B, T, K, E)."""
    torch.manual_seed(3)
    logits_BTE = torch.randn(4, 9, 6, dtype=torch.float64, requires_grad=True)
    chosen = (logits_BTE + torch.randn(6)).topk(3).indices
    return logits_BTE, F.one_hot(chosen, 6).double()


def test_sequence_balance_loss_is_deepseek_v3s():
    """Equations 17 to 20 of arXiv 2412.19437, one sequence and one expert at a time."""
    logits_BTE, one_hot_BTKE = routed("sigmoid")
    total = 0.0
    for sequence in range(4):
        for expert in range(6):
            f = 6 / (3 * 9) * one_hot_BTKE[sequence, :, :, expert].sum()
            scores_TE = torch.sigmoid(logits_BTE[sequence])
            normalized_T = scores_TE[:, expert] / scores_TE.sum(-1)
            total = total + f * normalized_T.sum() / 9
    expected = total / 4
    load_BE = one_hot_BTKE.sum((1, 2)).long()
    ours = sequence_balance_loss(load_BE, torch.sigmoid(logits_BTE.float()))
    torch.testing.assert_close(ours.double(), expected, atol=0, rtol=1e-6)
    (gradient,) = torch.autograd.grad(ours, logits_BTE)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits_BTE)[0], atol=1e-8, rtol=1e-4)


def test_batch_balance_loss_counts_all_choices():
    """Switch's E sum f P over a batch (arXiv 2101.03961), with f the share of all choices, not only of the first."""
    logits_BTE, one_hot_BTKE = routed("softmax")
    probabilities_NE = torch.exp(logits_BTE).flatten(0, 1) / torch.exp(logits_BTE).flatten(0, 1).sum(-1, keepdim=True)
    f_E = one_hot_BTKE.sum((0, 1, 2)) / (4 * 9 * 3)
    expected = 6 * sum(f_E[e] * probabilities_NE[:, e].mean() for e in range(6))
    ours = batch_balance_loss(one_hot_BTKE.sum((0, 1, 2)).long(), logits_BTE.float().flatten(0, 1).softmax(-1))
    torch.testing.assert_close(ours.double(), expected, atol=0, rtol=1e-6)
    (gradient,) = torch.autograd.grad(ours, logits_BTE)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits_BTE)[0], atol=1e-8, rtol=1e-4)
    even_NE = torch.full((36, 6), 1 / 6)
    assert batch_balance_loss(torch.full((6,), 18), even_NE).item() == pytest.approx(1.0)
    assert sequence_balance_loss(torch.full((4, 6), 9), even_NE.view(4, 9, 6)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["moe", "softmax_moe"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_layer_reports_its_own_loads_and_losses(name, mixed):
    """The layer's losses equal formulas over the router's inputs, which a hook records."""
    model, caught = build(name), []
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp.router.register_forward_hook(lambda router, inputs, output: caught.append((router, inputs[0])))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model.hidden_states(TOKENS, routings=(routings := []))
    assert len(caught) == len(routings) == model.config.num_layers - model.config.first_k_dense
    for (router, x_ND), routing in zip(caught, routings, strict=True):
        ids_NK, _, scores_NE = expected_routing(router, x_ND)
        assert routing.load_E.tolist() == torch.bincount(ids_NK.flatten(), minlength=5).tolist()
        assert routing.load_E.dtype == torch.int64
        logits_NE = x_ND.detach().double() @ router.weight.detach().double().T
        z = torch.log(torch.exp(logits_NE).sum(-1)).square().mean()
        assert routing.z.item() == pytest.approx(z.item(), rel=1e-5)
        load_BE = F.one_hot(ids_NK.view(3, -1), 5).sum(1).double()
        if router.kind == "sigmoid":
            share_BTE = (scores_NE / scores_NE.sum(-1, keepdim=True)).view(3, 12, 5)
            balance = (load_BE / 12 / 2 * 5 * share_BTE.mean(1)).sum(-1).mean()
        else:
            balance = (load_BE.sum(0) / 72 * 5 * scores_NE.mean(0)).sum()
        assert routing.balance.item() == pytest.approx(balance.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["moe", "softmax_moe"])
def test_nothing_is_reported_without_gradients(name):
    model, routings = build(name), []
    with torch.no_grad():
        model.hidden_states(TOKENS, routings=routings)
    assert routings == []


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["moe", "softmax_moe", "gpt2"])
def test_recomputation_changes_no_bit_and_counts_nothing_twice(name, mixed):
    """Activation checkpointing runs each block's forward pass twice."""
    outcomes = []
    for recompute in (False, True):
        model, calls = build(name), []
        model.recompute_blocks = recompute
        model.blocks[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            x_BTD = model.hidden_states(TOKENS, routings=(routings := []))
        loss = x_BTD.square().sum() + sum(r.balance + r.z for r in routings)
        loss.backward()
        assert len(calls) == 1 + recompute
        with torch.no_grad():
            model(TOKENS)
        assert len(calls) == 2 + recompute
        outcomes.append((loss, [r.load_E for r in routings], [p.grad.to_dense() for p in model.parameters()]))
    (loss, loads, grads), (again, recounted, regrads) = outcomes
    assert torch.equal(loss, again)
    assert [load.tolist() for load in loads] == [load.tolist() for load in recounted]
    assert all(torch.equal(a, b) for a, b in zip(grads, regrads, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["moe", "softmax_moe"])
@pytest.mark.parametrize("situation", ["fp32", "mixed", "grouped"])
def test_a_compiled_block_computes_the_same(name, situation, recompute, monkeypatch):
    """Only traced, because a compiler backend takes a minute. With a GPU's grouped products it is one graph."""
    mixed, grouped = situation != "fp32", situation == "grouped"
    torch.compiler.reset()  # dynamo stops compiling a function that other tests have compiled eight times
    keep_padding_uncompiled()
    run = torch.compile(Block._run, backend="aot_eager", fullgraph=grouped)
    monkeypatch.setattr(transformer, "_compiled_run", lambda: run)
    monkeypatch.setattr(experts, "_has_grouped_mm", lambda x, weight: grouped)
    outcomes = []
    for compiled in (False, True):
        model = build(name)
        model.recompute_blocks = recompute
        if compiled:
            model.compile_blocks()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            x_BTD = model.hidden_states(TOKENS, routings=(routings := []))
        loss = x_BTD.square().sum() + sum(r.balance + r.z for r in routings)
        loss.backward()
        outcomes.append((loss.item(), [r.load_E for r in routings], [p.grad.to_dense() for p in model.parameters()]))
    (loss, loads, grads), (compiled_loss, counted, compiled_grads) = outcomes
    assert compiled_loss == pytest.approx(loss, rel=1e-2 if mixed else 1e-5)
    # Rounding to bf16 elsewhere may move a token from one expert to another.
    assert sum((a - b).abs().sum().item() for a, b in zip(loads, counted, strict=True)) <= (4 if mixed else 0)
    for grad, compiled_grad in zip(grads, compiled_grads, strict=True):
        assert (grad - compiled_grad).norm() < (0.2 if mixed else 1e-5) * grad.norm()


def test_repeated_blocks_report_each_pass():
    torch.manual_seed(0)
    model = Transformer(replace(SHAPES["moe"], layer_sharing=3))
    model.hidden_states(TOKENS, routings=(routings := []))
    assert [int(r.load_E.sum()) for r in routings] == [2 * TOKENS.numel()] * 3


def test_active_parameters_and_operations_are_those_of_the_chosen_experts():
    """Torch counts the products of a one-token forward pass; each chosen expert is three."""
    for name in ("moe", "softmax_moe"):
        model = build(name)
        config, total = model.config, sum(p.numel() for p in model.parameters())
        layers = config.num_layers - config.first_k_dense
        idle = layers * (5 - 2) * 3 * config.hidden_size * config.moe_intermediate_size
        counts = model.num_parameters()
        assert (counts["total"], counts["active"]) == (total, total - idle)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(TOKENS[:1, :1])
        norms = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 1)
        assert model.flops_per_token(1) - 6 * norms == 3 * counter.get_total_flops()


def test_active_parameters_are_a_dense_models_of_the_same_width():
    moe = replace(CONFIG, moe_intermediate_size=10, num_shared_experts=1).resolved()
    dense = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_seq_len=16, vocab_size=97, intermediate_size=40)
    router = 6 * 16
    counts = [Transformer(config).num_parameters()["active"] for config in (moe, dense)]
    assert counts[0] == counts[1] + router
    default = replace(CONFIG, intermediate_size=96, moe_intermediate_size=0).resolved()
    assert default.moe_intermediate_size == 96 // 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok: must be from 1 to num_experts, 6, is 7"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: must be from 1 to num_experts, 6, is 0"),
        ({"first_k_dense": 1}, "first_k_dense: leaves no layer of experts: num_layers is 1"),
        ({"first_k_dense": -1}, "first_k_dense: must be at least 0"),
        ({"num_experts": -1}, "num_experts: must be at least 0"),
        ({"num_shared_experts": -1}, "num_shared_experts: must be at least 0"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size: must be at least 0"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor: must be a number above 0"),
        ({"mlp": "gelu"}, "mlp: experts are swiglu networks, is gelu"),
        ({"bias": True}, "bias: experts and their router have no biases"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob: must be false with one expert per token"),
    ],
)
def test_impossible_mixtures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change).resolved()


@pytest.mark.parametrize(
    "setting",
    [
        {"num_experts_per_tok": 4},
        {"num_shared_experts": 1},
        {"moe_intermediate_size": 8},
        {"first_k_dense": 1},
        {"router": "softmax"},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 2.0},
    ],
)
def test_settings_of_experts_need_experts(setting):
    dense = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, max_seq_len=16)
    [key] = setting
    assert replace(dense, **setting).problems() == [(key, "has no effect without model.num_experts; leave it out")]


def test_resolving_twice_is_resolving_once():
    for config in (CONFIG, SHAPES["moe"].resolved(), SHAPES["llama"].resolved()):
        assert config.resolved() == config


def test_one_expert_of_one_is_a_dense_network():
    config = replace(CONFIG, num_experts=1, num_experts_per_tok=1, norm_topk_prob=False, router="softmax").resolved()
    torch.manual_seed(1)
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BTD = torch.randn(2, 5, 16)
    gate, up, down = (parameter[0] for parameter in layer.experts.parameters())
    expected = F.linear(F.silu(F.linear(x_BTD, gate)) * F.linear(x_BTD, up), down)
    torch.testing.assert_close(layer(x_BTD)[0], expected, atol=1e-5, rtol=1e-4)
