"""Training on conversations: only trained tokens count, each conversation by itself, however the batch is shared."""

import sys
import threading
from pathlib import Path

import pytest
import torch

from lightlm.data.folder import DataFolder
from lightlm.errors import RecipeError
from lightlm.model.config import ModelConfig
from lightlm.model.moe import Router
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe
from lightlm.train.checkpointing.resume import data_identity
from lightlm.train.evaluations import Evaluations
from lightlm.train.observe.observers import Observer
from lightlm.train.planning.plan import make_plan
from lightlm.train.setup import open_data, set_up
from lightlm.train.step.loss import token_losses
from tests.train.group import together, train_together
from tests.train.step.conversations import conversations, one_by_one, write_conversations
from tests.train.step.routed import SOFTMAX
from tests.train.watch import Recorder, comparable, resume, start

SEQUENCE = 32
LENGTHS = {"train": [5, 33, 12, 9, 40, 21, 7, 30, 2, 16, 25, 8] * 5, "val": [11, 20, 6, 31]}
CHAT = (
    "data.dataset=data/talk", "data.document_mask=true", f"train.seq_len={SEQUENCE}", "train.batch_tokens=512",
    "train.tokens=2048", "train.z_loss=1e-3", "eval.every=1024", "eval.prompts=[]", "optimizer.lr=1e-3",
    "train.grad_clip=1000",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    if not Path("data/talk").is_dir():
        write_conversations(Path("data/talk"), Path("data/tiny"), LENGTHS)


@pytest.fixture
def setup():
    recipe = load_recipe("tiny.yaml", [*CHAT, "train.micro_batch_size=4"])
    return set_up(recipe, open_data(recipe), lambda message: None)


def exact_copy(model):
    copy = Transformer(model.config).double()
    copy.load_state_dict(model.state_dict())
    return copy.double()


def test_loss_and_gradients_are_those_of_conversations_one_by_one(setup):
    """A batch of every sequence has each conversation once: the float64 mean over its trained tokens."""
    count = len(setup.loader.packings["talk"])
    exact = exact_copy(setup.model)
    objective, total, trained = one_by_one(exact, conversations(Path("data/talk")), SEQUENCE + 1, z_loss=1e-3)
    (objective / trained).backward()
    outcome = setup.gradients(0, count, threading.Event())
    assert outcome.trained == trained == setup.loader.trained(0, count)
    assert outcome.loss == pytest.approx((total / trained).item(), rel=1e-6)
    for (name, found), wanted in zip(setup.model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-7, msg=name)


def test_validation_is_that_of_conversations_one_by_one():
    recipe = load_recipe("tiny.yaml", CHAT)
    setup = set_up(recipe, open_data(recipe), lambda message: None)
    found = Evaluations(setup, Path("runs"), Observer(), None, None).losses(threading.Event())
    with torch.no_grad():
        _, total, count = one_by_one(exact_copy(setup.model), conversations(Path("data/talk"), "val"), SEQUENCE + 1)
    assert found["val_loss"] == pytest.approx((total / count).item(), rel=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("trained", ["some", "none"])
def test_untrained_tokens_have_no_gradient(z_loss, trained):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=50, max_seq_len=8))
    inputs = torch.randint(50, (2, 8))
    targets = torch.full((2, 8), -100)
    if trained == "some":
        targets[0, 3] = 7
    captured = []
    hidden_states = model.hidden_states

    def keep(*given, **options):
        captured.append(hidden_states(*given, **options))
        captured[0].retain_grad()
        return captured[0]

    model.hidden_states = keep
    sums = token_losses(model, inputs, targets, z_loss=z_loss, masked=True)
    sums.objective.backward()
    gradients = captured[0].grad
    rest = torch.ones(2, 8, dtype=torch.bool)
    rest[0, 3] = trained == "none"
    assert (gradients[rest] == 0).all()
    assert bool(gradients.abs().sum() > 0) is (trained == "some")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_routers_learn_from_every_token():
    """The z-loss adds the gradient of its mean over all tokens of the batch, whatever share of them is trained on."""

    def last_router(coefficient):
        extra = (*SOFTMAX, "train.micro_batch_size=4", "moe.balance_loss_coef=0", f"moe.z_loss_coef={coefficient}")
        recipe = load_recipe("tiny.yaml", [*CHAT, *extra])
        setup = set_up(recipe, open_data(recipe), lambda message: None)
        routers = [module for module in setup.model.modules() if isinstance(module, Router)]
        inputs = []
        routers[-1].register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().double()))
        outcome = setup.gradients(0, 16, threading.Event())
        assert outcome.trained < 16 * SEQUENCE
        return routers[-1].weight, torch.cat([each.flatten(0, -2) for each in inputs])

    weight, inputs_ND = last_router(1.0)
    exact = weight.detach().double().requires_grad_()
    (inputs_ND @ exact.T).logsumexp(-1).square().mean().backward()
    torch.testing.assert_close((weight.grad - last_router(0.0)[0].grad).double(), exact.grad, rtol=1e-3, atol=1e-6)


def test_losses_do_not_depend_on_micro_batches_and_resume_is_exact():
    whole = start("tiny.yaml", *CHAT, name="talk-whole")[1].metrics
    for size in (1, 16):
        found = start("tiny.yaml", *CHAT, f"train.micro_batch_size={size}", name=f"talk-{size}")[1].metrics
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
        assert found[-1]["val_loss"] == pytest.approx(whole[-1]["val_loss"], rel=1e-5)
    stopped = Recorder(terminate_at=2)
    start("tiny.yaml", *CHAT, name="talk-stopped", watch=stopped)
    with pytest.raises(RecipeError, match=r"data\.too_long cannot change"):
        resume("talk-stopped", "data.too_long=drop")
    assert comparable(stopped.metrics + resume("talk-stopped")[1].metrics) == comparable(whole)


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
@pytest.mark.parametrize(("size", "strategy"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_losses_do_not_depend_on_processes(size, strategy):
    """Ranks have different numbers of trained tokens, so a mean of their means would differ."""
    one = start("tiny.yaml", *CHAT, name=f"talk-one-{size}{strategy}")[1].metrics
    overrides = (*CHAT, "train.micro_batch_size=2", f"train.parallel={strategy}")
    (metrics, _, _), *_ = together(size, train_together, f"talk-{strategy}-{size}", overrides)
    for key in ("loss", "z_loss", "trained_tokens"):
        assert [row[key] for row in metrics] == pytest.approx([row[key] for row in one], rel=1e-5)
    assert [row["grad_norm"] for row in metrics] == pytest.approx([row["grad_norm"] for row in one], rel=1e-4)
    assert metrics[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)


def test_a_plan_counts_the_epochs_of_conversations_as_the_run_does():
    """Their sequences are padded, and cut conversations that are longer."""
    recipe = load_recipe("tiny.yaml", CHAT)
    [planned] = make_plan(recipe, probe=False)["run"]["sources"]
    setup = set_up(recipe, open_data(recipe), lambda message: None)
    [read] = setup.sources(setup.recipe.train.tokens // SEQUENCE)
    assert planned["epochs"] == pytest.approx(read["epochs"], rel=1e-9)
    assert (planned["tokens"], planned["train_tokens"]) == (read["tokens"], read["train_tokens"])
    assert read["train_tokens"] != len(setup.data.streams("train")["talk"])


def test_other_masks_are_other_data():
    folder = DataFolder.open("data/talk")
    manifest = folder.manifest.model_copy(deep=True)
    manifest.chat.masks[0].xxh3 = "0" * 16
    assert data_identity(DataFolder(folder.path, manifest, {})) != data_identity(folder)


def test_every_token_of_text_counts_in_a_mixture():
    mix = [value for value in CHAT if not value.startswith("data.dataset")]
    recipe = load_recipe("tiny.yaml", [*mix, "data.mix={talk: 0.5, tiny: 0.5}"])
    setup = set_up(recipe, open_data(recipe), lambda message: None)
    inputs, targets, starts = setup.loader.batch(0, 8)
    numbers, _ = setup.loader.order.locate(torch.arange(8).numpy())
    text = torch.from_numpy(numbers == 1)
    assert (targets[text] >= 0).all()
    assert (starts[text] == (inputs[text] == setup.data.end_of_text_id)).all()
    assert setup.loader.trained(0, 8) == int((targets >= 0).sum()) < targets.numel()
    for part in setup.sources(setup.recipe.train.tokens // SEQUENCE):
        assert part["tokens"] == pytest.approx(part["epochs"] * part["train_tokens"], rel=0.01)
    metrics = start("tiny.yaml", *mix, "data.mix={talk: 0.5, tiny: 0.5}", name="talk-mixed")[1].metrics
    assert metrics[-1].keys() >= {"val_loss/talk", "val_loss/tiny", "trained_tokens"}
