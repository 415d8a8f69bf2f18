"""How routers are trained: the selection bias, and losses that only the gradients know."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.errors import RecipeError
from lightlm.model.moe import Router
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.train import trainer as trainer_module
from lightlm.train.step.parallel import LossModule, MicroBatch
from lightlm.train.step.routers import RouterLosses, move_selection_biases
from tests.shapes import build
from tests.train.step.routed import SHORT, SIGMOID, SIGMOID_MODEL, SOFTMAX, biases, expected_biases, loads, routed_run
from tests.train.watch import Recorder, comparable, resume, start


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def run(workspace):
    """An undisturbed run of 5 steps in 4 micro-batches each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return routed_run("undisturbed-experts", *SIGMOID, SHORT)


def weights(result_or_name):
    run_folder = RUNS / result_or_name if isinstance(result_or_name, str) else result_or_name.run
    return load_file(checkpoint.newest_checkpoint(run_folder) / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_bias_moves_once_a_step_by_the_formula(run):
    metrics, steps, result = run
    assert len(steps) == len(metrics) == 5
    assert (loads(steps).sum(-1) == 2 * 256).all()  # both choices of every token of the global batch
    assert np.array_equal(biases(steps), expected_biases(loads(steps), 0.01))
    assert len(np.unique(biases(steps)[-1])) > 1
    saved = weights(result)
    for layer, block in enumerate((1, 2)):
        bias = saved[f"blocks.{block}.mlp.router.selection_bias"]
        assert bias.dtype == torch.float32
        assert np.array_equal(bias.numpy(), biases(steps)[-1, layer])


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_the_micro_batch_changes_no_bias(run, micro_batch):
    metrics, steps, _ = routed_run(f"micro-{micro_batch}", *SIGMOID, SHORT, f"train.micro_batch_size={micro_batch}")
    assert np.array_equal(biases(steps), biases(run[1]))
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in run[0]], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_trains_the_same_model(run, dtype):
    """Bit for bit, and its second forward pass is not counted."""
    low = f"train.dtype={dtype}"
    plain = run if dtype == "float32" else routed_run("experts-bf16", *SIGMOID, SHORT, low)
    metrics, _, result = routed_run(f"recomputed-{dtype}", *SIGMOID, SHORT, low, "train.activation_checkpointing=true")
    assert comparable(metrics) == comparable(plain[0])
    assert same(weights(result), weights(plain[2]))
    assert load_recipe(result.run / "recipe.yaml").train.activation_checkpointing


def test_a_skipped_step_moves_no_bias(monkeypatch):
    plain = trainer_module.judge

    def judge(history, loss, norm, section):
        verdict = plain(history, loss, norm, section)
        return replace(verdict, skip=True, reason="a test") if len(verdict.history.losses) == 3 else verdict

    monkeypatch.setattr(trainer_module, "judge", judge)
    metrics, steps, _ = routed_run("skipped-experts", *SIGMOID, SHORT, "train.skip_spikes=true")
    assert [m["step"] for m in metrics if m.get("skipped")] == [3]
    counted = loads(steps)
    moved = expected_biases(np.delete(counted, 2, axis=0), 0.01)
    assert np.array_equal(biases(steps), moved[[0, 1, 1, 2, 3]])


def test_passes_of_a_repeated_block_share_one_bias():
    _, steps, _ = routed_run("repeated-experts", *SIGMOID, SHORT, "model.layer_sharing=2")
    assert (loads(steps).sum(-1) == 2 * 2 * 256).all()
    assert np.array_equal(biases(steps), expected_biases(loads(steps), 0.01))


def test_a_rate_of_zero_moves_nothing():
    _, steps, _ = routed_run("unbalanced", *SIGMOID, SHORT, "moe.bias_update_rate=0")
    assert not biases(steps).any()


def test_counts_beyond_floats_are_compared_exactly():
    model = build("moe")
    bias = model.blocks[1].mlp.router.selection_bias
    before, most = bias.clone(), 2**53
    move_selection_biases(model, torch.tensor([[most, most, most, most - 1, most + 1]]), 0.5)
    assert torch.sign(bias - before).tolist() == [0, 0, 0, 1, -1]


def test_moving_the_bias_balances_loads():
    """Tokens that prefer one expert: 400 moves bring the worst load from 5 times the mean to within a tenth."""
    torch.manual_seed(0)
    config = replace(build("moe").config, num_experts=10, first_k_dense=0, num_layers=1)
    model = Transformer(config)
    router = next(module for module in model.modules() if isinstance(module, Router))
    torch.nn.init.normal_(router.weight, std=0.1)
    x_ND = torch.randn(2000, 32) + 3 * router.weight[7] / router.weight[7].norm()

    def violation():
        load_E = torch.bincount(router(x_ND)[0].flatten(), minlength=10)
        return (load_E.max() / load_E.double().mean() - 1).item(), load_E

    assert violation()[0] > 1
    for _ in range(400):
        move_selection_biases(model, violation()[1][None], 0.001)
    assert violation()[0] < 0.1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_has_its_biases_bit_for_bit(name):
    overrides = (*SIGMOID, f"optimizer.name={name}", "train.tokens=2560")
    whole, watched = start("tiny.yaml", *overrides, name=f"whole-experts-{name}")
    stopped, before = start("tiny.yaml", *overrides, name=f"cut-experts-{name}", watch=Recorder(terminate_at=6))
    assert stopped.step == 6
    assert weights(stopped)["blocks.1.mlp.router.selection_bias"].any()
    result, after = resume(f"cut-experts-{name}")
    assert comparable(before.metrics + after.metrics) == comparable(watched.metrics)
    assert same(weights(result), weights(whole))


def losses(kind, caught):
    """(balance, z) of a router's forward passes, in float64 and with gradients, a pass a micro-batch of 2 x 32."""
    total_balance, total_z = 0.0, 0.0
    for router, x_ND in caught:
        logits_NE = x_ND.double() @ router.weight.double().T
        scores_NE = logits_NE.sigmoid() if kind == "sigmoid" else logits_NE.softmax(-1)
        ids_NK = (scores_NE if kind == "softmax" else scores_NE + router.selection_bias).topk(2).indices
        groups = 2 if kind == "sigmoid" else 1
        share_GE = F.one_hot(ids_NK.view(groups, -1), 5).double().mean(1) * 5
        score_GE = (scores_NE / scores_NE.sum(-1, keepdim=True)).view(groups, -1, 5).mean(1)
        total_balance = total_balance + (share_GE * score_GE).sum(-1).mean()
        total_z = total_z + logits_NE.logsumexp(-1).square().mean()
    return total_balance, total_z


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_gradients_are_of_the_cross_entropy_and_the_routers_losses(kind):
    """The first step's gradient norm against plain autograd over float64 formulas, for either loss alone and both."""
    overrides = (*(SIGMOID if kind == "sigmoid" else SOFTMAX), "train.tokens=256", "train.grad_clip=0")
    norms = []
    for balance, z in ((0.7, 0.0), (0.0, 0.3), (0.7, 0.3)):
        name = f"losses-{kind}-{balance}-{z}"
        caught, expected = [], []

        def prepare(trainer, balance=balance, z=z, caught=caught, expected=expected):
            model = trainer.model
            routers = [module for module in model.modules() if isinstance(module, Router)]
            hooks = [r.register_forward_pre_hook(lambda r, inputs: caught.append((r, inputs[0]))) for r in routers]
            total, parameters = 0.0, list(model.parameters())
            for first in range(0, 8, 2):
                inputs, targets = trainer.setup.loader.batch(first, 2)
                caught.clear()
                cross_entropy = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
                balanced, squared = losses(kind, caught)
                total = total + (cross_entropy + balance * balanced + z * squared) / 4
                expected.append(cross_entropy.item())
            gradients = torch.autograd.grad(total, parameters)
            expected.append(torch.nn.utils.get_total_norm(gradients).item())
            for hook in hooks:
                hook.remove()

        metrics, _, _ = routed_run(
            name, *overrides, f"moe.balance_loss_coef={balance}", f"moe.z_loss_coef={z}", edit=prepare
        )
        *cross_entropies, norm = expected
        assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics[0]["loss"] == pytest.approx(np.mean(cross_entropies), rel=1e-6)  # and none of the others
        norms.append(norm)
    assert len({round(norm, 3) for norm in norms}) == 3  # both losses matter


def test_the_validation_loss_is_the_cross_entropy_alone():
    measured = []

    def validated(trainer):
        val = trainer.data.main.split("val").slice(0, 1025)
        tokens = torch.from_numpy(np.array(val, dtype=np.int64))
        with torch.no_grad():
            logits = trainer.model(tokens[:-1].view(-1, 32))
        measured.append(
            (
                trainer.evaluations.losses(threading.Event())["val_loss"],
                F.cross_entropy(logits.flatten(0, 1), tokens[1:]).item(),
            )
        )

    for index, coefficients in enumerate(((), ("moe.balance_loss_coef=10", "moe.z_loss_coef=10"))):
        routed_run(f"validated-{index}", *SIGMOID, "train.tokens=256", *coefficients, edit=validated)
    assert measured[0][0] == measured[1][0]
    assert measured[0][0] == pytest.approx(measured[0][1], rel=1e-6)


def test_the_objective_is_counted_in_tokens():
    """Sums over tokens, so that micro-batches of other sizes weigh right."""
    model = build("moe")
    inputs, targets = torch.randint(97, (2, 3, 10), generator=torch.Generator().manual_seed(0)).unbind()
    plain = LossModule(model, RouterLosses())(MicroBatch(inputs, targets))
    both = LossModule(model, RouterLosses(balance=0.5, z=0.25))(MicroBatch(inputs, targets))
    model.hidden_states(inputs, routings=(routings := []))
    extra = sum(0.5 * r.balance + 0.25 * r.z for r in routings)
    assert plain.objective.item() == pytest.approx(plain.loss.item())
    assert both.loss.item() == plain.loss.item()
    assert (both.objective - plain.objective).item() == pytest.approx(30 * extra.item(), rel=1e-4)
    assert both.load_LE.tolist() == [r.load_E.tolist() for r in routings]
    assert not both.loss.requires_grad


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("moe.z_loss_coef=0.1",), "moe.z_loss_coef: has no effect without model.num_experts; leave it out"),
        (("moe.balance_loss_coef=0.1",), "moe.balance_loss_coef: has no effect without model.num_experts"),
        (("moe.bias_update_rate=0.1",), "moe.bias_update_rate: has no effect without model.num_experts"),
        (("moe.bias_update_rate=0",), "moe.bias_update_rate: has no effect without model.num_experts"),
        ((*SOFTMAX, "moe.bias_update_rate=0.1"), "moe.bias_update_rate: has no effect with model.router=softmax"),
        ((*SOFTMAX, "moe.bias_update_rate=0"), "moe.bias_update_rate: has no effect with model.router=softmax"),
        ((*SIGMOID, "moe.z_loss_coef=-1"), "moe.z_loss_coef: .*greater than or equal to 0"),
        (("model.router=softmax",), "model.router: has no effect without model.num_experts"),
        ((*SIGMOID, "moe.rate=1"), "moe.rate"),
    ],
)
def test_settings_without_effect_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("tiny.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "section"),
    [
        ((), None),
        (SIGMOID_MODEL, {"bias_update_rate": 0.001, "balance_loss_coef": 1e-4, "z_loss_coef": 0.0}),
        (
            (*SIGMOID_MODEL, "moe.balance_loss_coef=0"),
            {"bias_update_rate": 0.001, "balance_loss_coef": 0.0, "z_loss_coef": 0.0},
        ),
        (SOFTMAX, {"balance_loss_coef": 1e-2, "z_loss_coef": 0.0}),
        ((*SOFTMAX, "moe.z_loss_coef=1e-3"), {"balance_loss_coef": 1e-2, "z_loss_coef": 1e-3}),
    ],
)
def test_a_resolved_recipe_says_what_routers_are_trained_with(overrides, section, tmp_path):
    recipe = load_recipe("tiny.yaml", overrides)
    assert recipe.to_dict().get("moe") == section
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again.to_yaml() == recipe.to_yaml()
    assert again.router_training == recipe.router_training
