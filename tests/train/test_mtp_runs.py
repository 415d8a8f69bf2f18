"""Runs with multi-token prediction: what they log, save and load, however their batches are computed."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lightlm import checkpoint
from lightlm.cli.app import app
from lightlm.convert.load import load_pretrained
from lightlm.errors import RecipeError
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.train.schedules import mtp_weight
from tests.train.group import together, train_together
from tests.train.test_distributed import assert_close
from tests.train.watch import Recorder, comparable, resume, start

MTP = ("train.mtp={depth: 1, weight: 0.5, anneal: 60%}", "train.tokens=1280", "eval.every=640", "eval.prompts=[]")
MASKED = (*MTP, "data.document_mask=true", "train.dropout=0.1", "train.z_loss=0.01", "train.mtp.depth=2")
EXPERTS = (
    *MTP,
    *("model.num_experts=5", "model.num_experts_per_tok=2", "model.moe_intermediate_size=24"),
    *("model.first_k_dense=1", "model.num_shared_experts=1", "moe.bias_update_rate=0.01"),
)
KINDS = {"plain": MTP, "masked": MASKED, "experts": EXPERTS}


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def runs(workspace):
    """What one process logged, uninterrupted, with heads of each kind and without (`off`)."""
    kinds = KINDS | {"off": MTP[1:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return {kind: start("tiny.yaml", *given, name=f"mtp-{kind}")[1].metrics for kind, given in kinds.items()}


def assert_same(found, wanted):
    assert_close(found, wanted)
    assert [m["mtp_loss"] for m in found] == pytest.approx([m["mtp_loss"] for m in wanted], rel=1e-5)
    assert [m["mtp_weight"] for m in found] == [m["mtp_weight"] for m in wanted]


def test_its_loss_is_apart_and_its_weight_falls(runs):
    assert [m["mtp_weight"] for m in runs["plain"]] == [0.5, 0.5, 0.5, 0.1, 0.1]
    off = runs["off"]
    assert "mtp_loss" not in off[0]
    # The first step: the same weights see the same batch.
    assert runs["plain"][0]["loss"] == off[0]["loss"]
    assert runs["plain"][0]["mtp_loss"] == pytest.approx(5.77, abs=0.2)  # ln(320)
    assert runs["plain"][0]["grad_norm"] > off[0]["grad_norm"]
    assert runs["plain"][-1]["loss"] != off[-1]["loss"]


def test_the_validation_loss_is_that_of_the_exported_model(runs):
    """The checkpoint is read as any command reads it, without the heads."""
    from lightlm.train.evaluations import Evaluations
    from lightlm.train.observe.observers import Observer
    from lightlm.train.setup import open_data, set_up

    recipe = load_recipe("tiny.yaml", MTP[1:])
    setup = set_up(recipe, open_data(recipe), lambda message: None)
    loaded = load_pretrained("mtp-plain")
    assert not loaded.model.mtp
    setup.model.load_state_dict(loaded.model.state_dict())
    import threading

    found = Evaluations(setup, RUNS, Observer(), None, None).losses(threading.Event())
    assert found["val_loss"] == pytest.approx(runs["plain"][-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("override", ["train.micro_batch_size=8", "train.activation_checkpointing=true"])
def test_losses_do_not_depend_on_how_a_batch_is_computed(kind, override, runs):
    _, other = start("tiny.yaml", *KINDS[kind], override, name=f"mtp-{kind}-{override.partition('=')[0][6:]}")
    assert_same(other.metrics, runs[kind])


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_losses_do_not_depend_on_processes(kind, parallel, runs):
    given = (*KINDS[kind], f"train.parallel={parallel}")
    assert_same(together(2, train_together, f"mtp-{kind}-{parallel}", given)[0][0], runs[kind])
    saved = checkpoint.newest_checkpoint(RUNS / f"mtp-{kind}-{parallel}")
    ours = load_file(saved / "model.safetensors")
    theirs = load_file(checkpoint.newest_checkpoint(RUNS / f"mtp-{kind}") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("mtp.0.") for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact(kind, runs):
    stopped = Recorder(terminate_at=2)
    name = f"mtp-{kind}-stopped"
    start("tiny.yaml", *KINDS[kind], name=name, watch=stopped)
    torch.manual_seed(99)
    _, rest = resume(name)
    assert comparable(stopped.metrics + rest.metrics) == comparable(runs[kind])
    ours, theirs = (
        load_file(checkpoint.newest_checkpoint(RUNS / run) / "model.safetensors") for run in (name, f"mtp-{kind}")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_resumed_run_may_change_the_weight_and_not_the_depth(runs):
    with pytest.raises(RecipeError, match=r"train\.mtp\.depth cannot change in a resumed run"):
        resume("mtp-plain", "train.mtp.depth=2")
    with pytest.raises(RecipeError, match=r"train\.mtp\.depth cannot change"):
        resume("mtp-off", "train.mtp={depth: 1}")
    stopped = Recorder(terminate_at=2)
    start("tiny.yaml", *MTP, name="mtp-changed", watch=stopped)
    _, rest = resume("mtp-changed", "train.mtp.weight=0.2")
    assert [m["mtp_weight"] for m in rest.metrics] == [0.2, 0.1, 0.1]
    assert not any("has changed" in note for note in rest.notes)


def test_a_run_from_a_model_gets_heads_of_its_own(runs):
    given = ("train.init_from=mtp-off", *MTP)
    _, watch = start("tiny.yaml", *given, name="mtp-from")
    assert watch.metrics[0]["step"] == 0
    assert watch.metrics[0]["val_loss"] == pytest.approx(
        start("tiny.yaml", "train.init_from=mtp-off", *MTP[1:], name="mtp-from-off")[1].metrics[0]["val_loss"]
    )
    assert watch.metrics[-1]["mtp_loss"] < watch.metrics[1]["mtp_loss"]


def test_averages_of_weights_have_heads_too():
    given = (*MTP, "train.ema=20%")
    whole = start("tiny.yaml", *given, name="mtp-ema")[1].metrics
    stopped = Recorder(terminate_at=2)
    start("tiny.yaml", *given, name="mtp-ema-stopped", watch=stopped)
    assert comparable(stopped.metrics + resume("mtp-ema-stopped")[1].metrics) == comparable(whole)


def test_exports_leave_the_heads_out_and_say_so(runs, workspace):
    done = CliRunner().invoke(app, ["convert", "mtp-plain", "--out", str(workspace / "mtp-hf")])
    assert done.exit_code == 0, done.output
    assert "heads of multi-token prediction are left out" in " ".join(done.output.split())
    assert not any("mtp" in name for name in load_file(workspace / "mtp-hf" / "model.safetensors"))
    done = CliRunner().invoke(app, ["convert", "mtp-off", "--out", str(workspace / "off-hf")])
    assert "left out" not in done.output


@pytest.mark.parametrize("more", [(), ("--quantize", "int8"), ("--dtype", "bfloat16")])
@pytest.mark.parametrize("kind", ["plain", "experts"])
def test_generate_guesses_with_the_head_and_the_text_stays(kind, more, runs):
    def text(*options):
        given = ["generate", "The old", "--checkpoint", f"mtp-{kind}", "--max-new-tokens", "24", *more, *options]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    (plain, _), (guessed, notes) = text(), text("--mtp")
    assert guessed == plain
    assert "guesses were right" in notes


def test_the_weight_is_a_function_of_tokens():
    recipe = load_recipe("tiny.yaml", ["train.mtp={depth: 1, weight: 0.4, anneal: 512, final_weight: 0}"])
    assert [mtp_weight(recipe, tokens, 256, 5120) for tokens in (0, 256, 384, 512)] == [0.4, 0.4, 0.0, 0.0]
    constant = load_recipe("tiny.yaml", ["train.mtp={depth: 1, anneal: 100%}"])
    assert mtp_weight(constant, 4864, 256, 5120) == 0.3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.mtp={weight: 0.2}", r"train\.mtp\.weight: has no effect without train\.mtp\.depth"),
        ("train.mtp={dept: 1}", r"train\.mtp\.dept: unknown key; did you mean train\.mtp\.depth"),
        ("train.mtp={depth: 1, anneal: 100%, final_weight: 0}", r"final_weight: has no effect with train\.mtp\.anneal"),
        ("train.mtp={depth: 32}", r"train\.mtp\.depth: must be below the 32 tokens of a sequence"),
        ("train.mtp={depth: 1, anneal: 6K}", r"train\.mtp\.anneal: 6K exceeds the run's 5,120 tokens"),
        ("train.mtp={depth: 1, anneal: soon}", r"train\.mtp\.anneal: write a share of the run"),
        ("train.mtp=1", r"train\.mtp: should be a section with keys of its own"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("tiny.yaml", [override])


def test_settings_that_an_override_makes_idle_are_left_out(workspace):
    text = (workspace / "tiny.yaml").read_text().replace("seed: 7,", "seed: 7, mtp: {depth: 1, weight: 0.2},")
    (workspace / "ahead.yaml").write_text(text)
    notes = []
    recipe = load_recipe("ahead.yaml", ["train.mtp.depth=0"], notes.append)
    assert recipe.train.mtp.depth == 0
    assert [note.split(" of ")[0] for note in notes] == ["train.mtp.weight 0.2"]
    assert recipe.to_dict()["train"]["mtp"] == {"depth": 0}
