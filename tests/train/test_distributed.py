"""Many processes: the same losses whatever their number, exact resumption, one writer, one voice."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.errors import LightLMError, RecipeError, UsageError
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.train.distributed import World
from lightlm.train.schedules import batch_plan
from lightlm.train.step.gradients import check_shares
from tests.train.group import Command, together, train_together
from tests.train.watch import Recorder, comparable, make_trainer, resume, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds and forks processes the Linux way")

# 8 steps, checkpoints at 5 and 8; 27 validation windows in batches of 2, the last of which 4 processes cannot share.
SHORT = ("train.tokens=2048", "eval.every=1024", "eval.tokens=864")
LONG = ("train.tokens=12800", "eval.every=0", "eval.prompts=[]", "checkpoint.every=1280")  # 50 steps


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def runs(workspace):
    """The same short run by 1, 2 and 4 processes: the metrics that each writer saw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        metrics = {1: start("tiny.yaml", *SHORT, name="world-1")[1].metrics}
        for size in (2, 4):
            outcomes = together(size, train_together, f"world-{size}", SHORT)
            metrics[size] = outcomes[0][0]
            assert not any(seen for seen, _, _ in outcomes[1:])  # the others observe nothing
        return metrics


def weights(name):
    return load_file(checkpoint.newest_checkpoint(RUNS / name) / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_close(first, second):
    assert [m["step"] for m in first] == [m["step"] for m in second]
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for key in ("val_loss", "val_bpb"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-6)


def test_losses_do_not_depend_on_the_number_of_processes(runs):
    assert ["val_loss" in m for m in runs[1]] == [False, False, False, True] * 2
    assert_close(runs[2], runs[1])
    assert_close(runs[4], runs[1])


def test_one_process_writes(runs, workspace):
    for size, metrics in runs.items():
        lines = (workspace / f"runs/world-{size}/metrics.jsonl").read_text().splitlines()
        assert comparable(map(json.loads, lines)) == comparable(metrics)
        assert len(lines) == 8


@pytest.mark.parametrize("stop_rank", [0, 3])
def test_a_signal_to_one_of_four_stops_all_and_resuming_repeats_the_run_bit_for_bit(runs, stop_rank):
    """Also after DistributedDataParallel has ordered its buckets anew, which a new process has still to do."""
    name = f"stopped-{stop_rank}"
    before = together(4, train_together, name, SHORT, 3, stop_rank)
    assert [interrupted for _, _, interrupted in before] == [True] * 4
    # With one micro-batch each, the signal comes after they have agreed on step 4, so they finish it.
    assert [path.name for path in checkpoint.checkpoints(RUNS / name)] == ["step_000004"]
    after = together(4, train_together, name, (), None, 0, True)
    assert comparable(before[0][0] + after[0][0]) == comparable(runs[4])
    assert_same_weights(name, "world-4")


def test_sharded_runs_save_by_the_writers_clock(runs):
    recipe = ("train.tokens=512", "eval.every=0", "checkpoint.every=0", "checkpoint.every_minutes=1e-9")
    together(2, train_together, "clock", (*recipe, "train.parallel=fsdp"))
    assert [path.name for path in checkpoint.checkpoints(RUNS / "clock")] == ["step_000001", "step_000002"]


def stop_in_validation(world, name):
    """A run whose second process gets SIGTERM within the validation after step 4; what its writer saw."""
    watch = Recorder()
    trainer = make_trainer(load_recipe("tiny.yaml", SHORT), name, watch, lambda *_: "...", world=world)
    plain = trainer.loss.evaluate

    def evaluate(*batch):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*batch)

    trainer.loss.evaluate = evaluate
    return watch.metrics, trainer.train().interrupted


def test_a_signal_to_one_process_ends_the_validation_of_all(runs):
    (before, interrupted), (_, other) = together(2, stop_in_validation, "half-validated")
    assert interrupted
    assert other
    assert [m["step"] for m in before] == [1, 2, 3]
    after = together(2, train_together, "half-validated", (), None, 0, True)[0][0]
    assert comparable(before + after) == comparable(runs[2])


def test_another_number_of_processes_may_resume(runs):
    together(2, train_together, "changing", SHORT, 3)
    _, watch = resume("changing")
    assert_close(watch.metrics, runs[1][3:])


def test_sharded_and_plain_runs_resume_each_other(runs):
    sharded = (*SHORT, "train.parallel=fsdp")
    first = together(2, train_together, "shards", sharded, 3)[0][0]
    shutil.copytree("runs/shards", "runs/shards-copy", symlinks=True)
    _, watch = resume("shards", "train.parallel=ddp")
    assert_close(first + watch.metrics, runs[1])
    assert_close(first + together(2, train_together, "shards-copy", (), None, 0, True)[0][0], runs[1])
    start("tiny.yaml", *SHORT, name="plain", watch=Recorder(terminate_at=3))
    onwards = together(2, train_together, "plain", ("train.parallel=fsdp",), None, 0, True)[0][0]
    assert_close(onwards, runs[1][3:])
    assert {tensor.dtype for tensor in weights("plain").values()} == {torch.float32}


SHAPES = [
    ("model.layer_sharing=2", "model.tie_embeddings=true", "model.attention_gate=true"),
    (
        *("model.tie_embeddings=false", "model.norm=layernorm", "model.position=learned", "model.bias=true"),
        "data.document_mask=true",
    ),
    ("model.multipliers=both", "model.residual_scale=0.5", "model.embedding_scale=3", "model.base_depth=1"),
    (
        "model.attention=mla",
        "model.num_kv_heads=0",
        "model.qk_norm=false",
        "model.q_lora_rank=12",
        "model.kv_lora_rank=9",
    ),
]


@pytest.mark.parametrize("shape", SHAPES, ids=["shared", "untied", "scaled", "latents"])
def test_shared_blocks_untied_heads_and_learned_scales_in_both_strategies(shape):
    name, short = shape[0].partition(".")[2].partition("=")[0], (*shape, "train.tokens=768", "eval.prompts=[]")
    _, single = start("tiny.yaml", *short, name=f"{name}-single")
    for strategy in ("ddp", "fsdp"):
        outcomes = together(2, train_together, f"{name}-{strategy}", (*short, f"train.parallel={strategy}"))
        assert_close(outcomes[0][0], single.metrics)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_mixed_precision_keeps_sharded_losses_near(norm):
    bias = f"model.bias={str(norm == 'layernorm').lower()}"
    short = ("train.tokens=768", "train.dtype=bfloat16", "eval.prompts=[]", f"model.norm={norm}", bias)
    _, single = start("tiny.yaml", *short, name=f"{norm}-single")
    sharded = together(2, train_together, f"{norm}-sharded", (*short, "train.parallel=fsdp"))[0][0]
    for a, b in zip(sharded, single.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    assert {tensor.dtype for tensor in weights(f"{norm}-sharded").values()} == {torch.float32}


def test_a_number_that_does_not_divide_the_batch_names_those_that_do(workspace):
    recipe = load_recipe("tiny.yaml")
    with pytest.raises(RecipeError, match=r"3 processes cannot share the 8 sequences.*one of 1, 2, 4, 8 .*of 96"):
        check_shares(recipe, batch_plan(recipe), 3)


def test_devices_that_processes_cannot_share(monkeypatch):
    two = World(0, 2, 0, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="need a GPU each, and this one sees 1; start 1"):
        two.pick_device("cuda")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # a launcher that sets only ranks, perhaps on two machines
    with pytest.raises(UsageError, match="sees 1; set LOCAL_WORLD_SIZE and LOCAL_RANK on several, start 1"):
        two.pick_device("cuda")
    with pytest.raises(UsageError, match="names one GPU for 2 processes"):
        two.pick_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(1, 2, 1, 2).pick_device("cuda") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_86"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1) if device.index else (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    with pytest.raises(UsageError, match="has no code for NVIDIA GeForce GTX 1080"):
        World(1, 2, 1, 2).pick_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="cannot train on MPS"):
        two.pick_device("mps")


def small_memory(monkeypatch_or_none, largest, rank=None):
    """A model whose forward pass fails, as CUDA would, for more than `largest` sequences."""
    from lightlm.train.step import parallel

    plain = parallel.token_losses

    def token_losses(model, inputs, targets, routings=None, **settings):
        if model.training and len(inputs) > largest and rank in (None, int(os.environ.get("RANK", 0))):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, inputs, targets, routings, **settings)

    if monkeypatch_or_none is None:
        parallel.token_losses = token_losses
    else:
        monkeypatch_or_none.setattr(parallel, "token_losses", token_losses)


def train_in_small_memory(world, name, overrides, largest, rank):
    small_memory(None, largest, rank)
    return train_together(world, name, overrides)


def test_an_automatic_micro_batch_shrinks_to_what_fits(runs, monkeypatch):
    """The batch and its samples stay: losses equal those of an undisturbed run."""
    small_memory(monkeypatch, 3)
    _, watch = start("tiny.yaml", *SHORT, "train.micro_batch_size=auto", name="shrunk")
    assert watch.facts["micro_batch"] == 8
    assert [note.partition(" does")[0] for note in watch.notes] == [
        "a micro-batch of 8 sequences", "a micro-batch of 4 sequences"
    ]  # fmt: skip
    assert_close(watch.metrics, runs[1])


def test_the_smallest_memory_of_two_processes_decides(runs):
    outcomes = together(2, train_in_small_memory, "unequal", (*SHORT, "train.micro_batch_size=auto"), 2, 1)
    assert "continuing with 2" in outcomes[0][1][0]
    assert_close(outcomes[0][0], runs[1])


def test_a_given_micro_batch_that_does_not_fit_is_one_error(monkeypatch):
    small_memory(monkeypatch, 3)
    with pytest.raises(
        LightLMError, match=r"train.micro_batch_size, 8 sequences of 32 tokens, does not fit; set .* 4 or"
    ):
        start("tiny.yaml", "train.micro_batch_size=8", name="given")
    small_memory(monkeypatch, 0)
    with pytest.raises(LightLMError, match=r"1 sequences.*lower train.seq_len"):
        start("tiny.yaml", "train.micro_batch_size=auto", name="hopeless")


@pytest.fixture(scope="module")
def undisturbed(workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        together(2, train_together, "undisturbed", LONG)
    return "undisturbed"


@pytest.mark.parametrize("launcher", ["nproc", "torchrun"])
def test_a_killed_process_is_restarted_and_the_run_resumes_bit_for_bit(undisturbed, workspace, launcher):
    name = f"killed-{launcher}"
    if launcher == "nproc":  # the launcher chooses the run's name: the recipe's, unless it is taken
        command = Command("tiny.yaml", *LONG, f"name={name}", "--nproc", "2", "--max-restarts", "1")
    else:
        recipe = ("tiny.yaml", *LONG, "--name", name, "--auto-resume")
        command = Command(*recipe, torchrun=("--nproc-per-node", "2", "--max-restarts", "1", "--standalone"))
    command.await_steps(workspace / "runs" / name / "metrics.jsonl", 8)
    command.signal_rank(1, signal.SIGKILL)
    code, out, err = command.finish()
    assert code == 0, err
    assert out.count("Run runs/") == 1
    assert "resumed after step" in err
    if launcher == "nproc":
        assert "process 1 of 2 was ended by SIGKILL" in err
        assert "restarting all from the last checkpoint (1 of 1)" in " ".join(err.split())
        assert "Traceback" not in err
    lines = (workspace / "runs" / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 51))
    assert not (workspace / "runs" / f"{name}-2").exists()
    assert_same_weights(name, undisturbed)


def test_a_restart_finds_its_run_among_others_of_its_name(workspace):
    """The recipe's name is occupied, so the first attempt starts `occupied-2`; the restart resumes that one."""
    (workspace / "runs/occupied").mkdir(parents=True)
    (workspace / "runs/occupied/recipe.yaml").write_text("name: occupied\n")
    longer = ("train.tokens=25600", "checkpoint.asynchronous=false")  # 100 steps; step 5 is saved before 8
    command = Command("tiny.yaml", *LONG, *longer, "name=occupied", "--max-restarts", "1")
    command.await_steps(workspace / "runs/occupied-2/metrics.jsonl", 8)
    command.signal_rank(0, signal.SIGKILL)
    code, out, err = command.finish()
    assert code == 0, err
    assert "Run runs/occupied-2: step 100" in out
    assert "resumed after step" in err
    assert not (workspace / "runs/occupied-3").exists()
    assert [path.name for path in (workspace / "runs/occupied").iterdir()] == ["recipe.yaml"]


def test_a_restart_by_torchrun_without_auto_resume_is_refused(workspace, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, _, err = Command("tiny.yaml", *LONG).finish()
    assert code == 2
    assert "add --name and --auto-resume" in " ".join(err.split())


def test_without_restarts_a_killed_process_is_one_message(workspace):
    command = Command("tiny.yaml", *LONG, "--name", "dead", "--nproc", "2")
    command.await_steps(workspace / "runs/dead/metrics.jsonl", 8)
    command.signal_rank(0, signal.SIGKILL)
    code, out, err = command.finish()
    assert (code, out) == (1, "")
    assert err.count("Error:") == 1
    assert "process 0 of 2 was ended by SIGKILL" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_once_and_exit_with_130(undisturbed, workspace, number):
    name = f"interrupted-{number}"
    command = Command("tiny.yaml", *LONG, "--name", name, "--nproc", "2", "--json")
    command.await_steps(workspace / "runs" / name / "metrics.jsonl", 3)
    command.signal_all(number)
    code, out, err = command.finish()
    assert code == 130, err
    result = json.loads(out)
    assert result["interrupted"]
    assert checkpoint.newest_checkpoint(workspace / "runs" / name).name == f"step_{result['step']:06d}"
    assert err.count(f"step_{result['step']:06d}") == 1
    together(2, train_together, name, (), None, 0, True)
    assert_same_weights(name, undisturbed)


def test_processes_without_their_launcher_save_and_stop(workspace):
    command = Command("tiny.yaml", *LONG, "--name", "orphans", "--nproc", "2")
    command.await_steps(workspace / "runs/orphans/metrics.jsonl", 3)
    command.signal_launcher(signal.SIGKILL)
    _, out, _ = command.finish()  # waits for the end of their output too
    step = len((workspace / "runs/orphans/metrics.jsonl").read_text().splitlines())
    assert step < 50
    assert f"Run runs/orphans: step {step}" in out
    assert checkpoint.newest_checkpoint(workspace / "runs/orphans").name == f"step_{step:06d}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(("tiny.yaml", "data.dataset=nowhere"), 1, "data/nowhere"), (("--name", "x"), 2, "name a recipe")],
)
def test_a_mistake_is_one_message_and_its_exit_code(arguments, code, message):
    got, out, err = Command(*arguments, "--nproc", "2", "--max-restarts", "2").finish()
    assert (got, out) == (code, "")
    assert err.count("Error:") == 1
    assert message in err
    assert "Traceback" not in err
