import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.errors import CheckpointError, DataError, RecipeError
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.recipe import load_recipe
from lightlm.runs import find_run
from lightlm.train import setup
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.observe.metrics import read_metrics
from lightlm.train.step import compilation, gradients
from lightlm.train.step.gradients import micro_batch_size
from lightlm.train.trainer import TrainingDivergedError
from tests.shapes import build
from tests.test_recipe import PARAMETERS
from tests.train.watch import Recorder, comparable, make_trainer, resume, start


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def whole_run(workspace):
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return start(name="whole")


def weights(run):
    return load_file(checkpoint.newest_checkpoint(run) / "model.safetensors")


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_learns_and_leaves_what_the_contract_names(whole_run):
    result, watch = whole_run
    assert not result.interrupted
    assert result.step == 20
    first, last = watch.metrics[0], watch.metrics[-1]
    assert first["loss"] == pytest.approx(math.log(320), rel=0.03)
    assert last["val_loss"] == result.val_loss < 3.6
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"} <= first.keys()
    assert [m["step"] for m in watch.metrics if "val_loss" in m] == [10, 20]
    assert [step for step, _, _ in watch.samples] == [10, 20]
    assert watch.saved == [f"step_{step:06d}" for step in (5, 10, 15, 20)]
    run = result.run
    assert comparable(read_metrics(run)) == comparable(watch.metrics)
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_000015", "step_000020"]
    assert {path.name for path in (run / "checkpoints/latest").resolve().iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "training_state.pt", "complete.json",
    }  # fmt: skip
    assert load_recipe(run / "recipe.yaml").model.vocab_size == 320
    assert (run / "samples/step_000020.txt").read_text(encoding="utf-8") == "The old...\n"


def test_bits_per_byte_leave_out_the_end_of_text(whole_run, workspace):
    """Against cross-entropy in float64: end-of-text targets count in nats per token and not in bits per byte."""
    data = DataFolder.open(workspace / "data/tiny")
    tokens = torch.from_numpy(data.split("val").slice(0, 1025))
    result, _ = whole_run
    model = checkpoint.load_model(checkpoint.newest_checkpoint(result.run)).model.double().eval()
    with torch.no_grad():
        logits = model(tokens[:-1].view(-1, 32)).flatten(0, 1)
    nats = F.cross_entropy(logits, tokens[1:], reduction="none")
    text = tokens[1:] != data.tokenizer.end_of_text_id
    assert (~text).sum() > 5
    num_bytes = len(data.tokenizer.decode(tokens[1:].tolist()).encode())
    assert result.val_loss == pytest.approx(nats.mean().item(), rel=1e-6)
    assert result.val_bpb == pytest.approx(nats[text].sum().item() / math.log(2) / num_bytes, rel=1e-6)


@pytest.mark.parametrize("stop_at", [1, 5, 13])
def test_sigterm_and_resume_equal_an_uninterrupted_run_bit_for_bit(whole_run, stop_at):
    whole, whole_watch = whole_run
    name = f"stopped-{stop_at}"
    result, before = start(name=name, watch=Recorder(terminate_at=stop_at))
    assert result.interrupted
    assert result.step == stop_at
    assert checkpoint.newest_checkpoint(result.run).name == f"step_{stop_at:06d}"
    torch.manual_seed(12345)
    result, after = resume(name)
    assert not result.interrupted
    assert after.facts["first_step"] == stop_at
    assert comparable(before.metrics + after.metrics) == comparable(whole_watch.metrics)
    assert comparable(read_metrics(result.run)) == comparable(whole_watch.metrics)
    assert_same_weights(weights(result.run), weights(whole.run))


def test_signal_in_mid_accumulation_undoes_the_step(whole_run):
    """The signal comes inside step 4, between micro-batches: the run saves step 3."""
    trainer = make_trainer(load_recipe("tiny.yaml"), "middle", Recorder())
    plain, calls = trainer.setup.loader.batch, []

    def batch(start, count):
        calls.append(count)
        if len(calls) == 3 * trainer.facts()["accumulation"] + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(start, count)

    trainer.setup.loader.batch = batch
    assert trainer.facts()["accumulation"] == 4
    result = trainer.train()
    assert result.interrupted
    assert result.step == 3
    final, _ = resume("middle")
    assert_same_weights(weights(final.run), weights(whole_run[0].run))


def test_kill_before_a_checkpoint_drops_later_metrics_on_resume(whole_run):
    """SIGKILL leaves metrics past the last checkpoint and half a line; resuming replaces both."""
    result, _ = start(name="killed", watch=Recorder(terminate_at=10))
    path = result.run / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 11, "loss": 1.0}) + "\n" + '{"step": 12, "lo')
    final, _ = resume("killed")
    assert [m["step"] for m in read_metrics(final.run)] == list(range(1, 21))
    assert_same_weights(weights(final.run), weights(whole_run[0].run))


class Kill(BaseException):
    """Ends a run as SIGKILL would, but leaves this process."""


@pytest.mark.parametrize("step", [10, 20])
def test_a_run_killed_in_a_sample_has_its_checkpoint_and_repeats_the_evaluation(whole_run, step):
    def sampler(model, prompt):
        if trainer.progress.step == step:
            raise Kill
        return "..."

    whole, watch, before = *whole_run, Recorder()
    name = f"killed-in-sample-{step}"
    trainer = make_trainer(load_recipe("tiny.yaml"), name, before, sampler)
    with pytest.raises(Kill):
        trainer.train()
    assert checkpoint.newest_checkpoint(trainer.run_folder).name == f"step_{step:06d}"
    result, after = resume(name)
    assert not any("complete" in note for note in after.notes)
    assert (result.val_loss, result.interrupted) == (whole.val_loss, False)
    assert comparable(before.metrics + after.metrics) == comparable(watch.metrics)
    assert comparable(read_metrics(result.run)) == comparable(watch.metrics)
    assert (result.run / f"samples/step_{step:06d}.txt").is_file()
    assert_same_weights(weights(result.run), weights(whole.run))
    assert "is complete" in resume(name)[1].notes[-1]


def test_a_signal_ends_an_evaluation_which_resuming_repeats(whole_run):
    """In the last validation: all tokens are trained, but the run is not complete."""

    class Watch(Recorder):
        def phase(self, name, share=None):
            if name == "validating" and share and trainer.progress.step == 20:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(load_recipe("tiny.yaml"), "stopped-validating", Watch(), lambda *_: "...")
    result = trainer.train()
    assert (result.interrupted, result.step) == (True, 20)
    assert [m["step"] for m in read_metrics(result.run)] == list(range(1, 20))
    result, after = resume("stopped-validating")
    assert not result.interrupted
    assert [m["step"] for m in after.metrics] == [20]
    assert comparable(read_metrics(result.run)) == comparable(whole_run[1].metrics)


def test_a_sample_that_fails_is_noted_and_training_goes_on(whole_run):
    def sampler(model, prompt):
        raise torch.OutOfMemoryError("no memory left")

    watch = Recorder()
    make_trainer(load_recipe("tiny.yaml", ["train.tokens=2560"]), "no-samples", watch, sampler).train()
    assert watch.notes == ["eval.prompts could not be continued at step 10: no memory left"]
    assert "val_loss" in watch.metrics[-1]


def test_what_runs_between_steps_is_named(whole_run):
    saved, evaluated = ["saving a checkpoint"], ["saving a checkpoint", "sampling", "validating"]
    assert whole_run[1].phases == (saved + evaluated) * 2


def test_checkpoints_come_by_the_clock_too():
    recipe = ("tiny.yaml", "train.tokens=1024", "eval.every=0", "checkpoint.every=0")
    assert start(*recipe, "checkpoint.every_minutes=0", name="clock-off")[1].saved == ["step_000004"]
    assert start(*recipe, name="clock-15")[1].saved == ["step_000004"]
    saved = start(*recipe, "checkpoint.every_minutes=1e-9", name="by-the-clock")[1].saved
    assert saved == [f"step_{step:06d}" for step in (1, 2, 3, 4)]


def test_the_machine_is_recorded_from_the_start():
    class Watch(Recorder):
        def step(self, metrics):
            assert json.loads(machine.read_text())["device"].startswith("cpu")
            super().step(metrics)

    machine = Path("runs/recorded/machine.json")
    start("tiny.yaml", "train.tokens=256", name="recorded", watch=Watch())
    assert machine.is_file()


def test_resume_without_a_checkpoint_starts_over(whole_run):
    result, _ = start(name="early", watch=Recorder(terminate_at=1))
    for path in checkpoint.checkpoints(result.run):
        (path / checkpoint.MARKER).unlink()
    final, watch = resume("early")
    assert watch.facts["first_step"] == 0
    assert_same_weights(weights(final.run), weights(whole_run[0].run))


def test_micro_batches_add_up_to_the_same_global_batch(whole_run):
    _, split = whole_run
    _, joined = start("tiny.yaml", "train.micro_batch_size=8", name="joined")
    assert joined.facts["accumulation"] == 1
    assert split.facts["accumulation"] == 4
    for a, b in zip(split.metrics[:5], joined.metrics[:5], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint():
    class Poison(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics["step"] == 7:
                with torch.no_grad():
                    trainer.model.embed_tokens.weight[:] = float("nan")

    trainer = make_trainer(load_recipe("tiny.yaml"), "diverged", Poison())
    with pytest.raises(TrainingDivergedError, match=r"diverged at step 8: loss nan.*step_000005"):
        trainer.train()
    kept = checkpoint.newest_checkpoint(trainer.run_folder)
    assert kept.name == "step_000005"
    assert checkpoint.load_model(kept).model.embed_tokens.weight.isfinite().all()


def test_learning_rate_warms_up_and_decays(whole_run):
    rates = [m["lr"] for m in whole_run[1].metrics]
    assert rates[0] == pytest.approx(1e-2 * 0.25)  # the middle of step 1 of a two-step warm-up
    assert max(rates) == rates[5] == 1e-2
    assert 0 < rates[-1] < rates[-2] < 1e-2


def test_decay_falls_on_matrices_only():
    model = build("gpt2")
    optimizer = build_optimizer(model, load_recipe("demo").optimizer, torch.float32)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and "norm" not in name), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.skipif(not compilation._can_link(), reason="torch lies in a folder with blanks in its path")
def test_compiled_training_matches_eager(whole_run):
    _, watch = start("tiny.yaml", "train.compile=true", "train.tokens=768", "schedule.warmup=512", name="compiled")
    for eager, compiled in zip(whole_run[1].metrics[:3], watch.metrics, strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)


def test_resume_refuses_what_a_run_must_keep(whole_run):
    with pytest.raises(RecipeError, match=r"model.num_layers, train.seed cannot change"):
        resume("whole", "model.num_layers=3", "train.seed=1")
    with pytest.raises(CheckpointError, match="no run at nothing"):
        resume("nothing")


def test_a_longer_run_goes_on_from_a_finished_one(whole_run):
    start(name="longer")
    result, watch = resume("longer", "train.tokens=5632")
    assert [m["step"] for m in watch.metrics] == [21, 22]
    assert result.step == 22


def test_a_vocabulary_too_small_for_the_data_is_refused():
    with pytest.raises(DataError, match=r"model.vocab_size 300.*has 320 entries"):
        start("tiny.yaml", "model.vocab_size=300", name="small-vocabulary")


def test_rows_beyond_the_tokenizer_are_noted():
    _, watch = start("tiny.yaml", "model.vocab_size=384", "train.tokens=256", name="padded")
    assert watch.notes == ["model.vocab_size 384 exceeds the tokenizer's 320: 64 rows stay unused"]


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"finetune", "chat"}))  # they start from a model
def test_every_recipe_trains_two_steps_in_a_tiny_shape(name):
    """The recipe's own architecture, schedule and optimizer; sizes and data replaced."""
    model = load_recipe(name).model
    width = {
        "hidden_size": 8 * model.num_heads,
        "intermediate_size": 48,
        "max_seq_len": 32,
        "vocab_size": 320,
        "sliding_window": model.sliding_window and 8,
    }
    shape = [f"model.{key}={value}" for key, value in (width | {"num_layers": 2}).items()]
    small = ["data.dataset=tiny", "train.tokens=128", "train.batch_tokens=64", "train.device=cpu", "eval.tokens=64"]
    schedule = ["schedule.warmup=50%"] + (["schedule.decay=50%"] if load_recipe(name).schedule.decay else [])
    result, watch = start(name, *shape, *small, *schedule, name=f"recipe-{name}")
    assert result.step == 2
    assert all(math.isfinite(m["loss"]) for m in watch.metrics)
    config = checkpoint.load_model(checkpoint.newest_checkpoint(result.run)).model.config
    for field in dataclasses.fields(config):
        if field.name not in {*width, "num_layers", "num_kv_heads", "head_dim"}:
            assert getattr(config, field.name) == getattr(model, field.name), field.name


def test_data_without_a_validation_split_trains_without_validation(workspace):
    prepare(str(workspace / "tiny.jsonl"), "train:320", workspace / "data" / "no-val", val_fraction=0)
    result, watch = start("tiny.yaml", "data.dataset=no-val", "train.tokens=256", name="no-validation")
    assert result.val_loss is None
    assert "no validation split" in watch.notes[0]
    assert checkpoint.newest_checkpoint(result.run).name == "step_000001"


def test_a_prompt_too_long_to_continue_is_refused_at_the_start(workspace):
    with pytest.raises(RecipeError, match=r"eval.prompts has 40 tokens, model.max_seq_len is 32"):
        start("tiny.yaml", f"eval.prompts=[{'q' * 40}]", name="long-prompt")


def test_resume_refuses_data_that_changed_under_its_name(workspace):
    source, folder = str(workspace / "tiny.jsonl"), workspace / "data" / "moving"
    prepare(source, "train:320", folder, val_fraction=0.1)
    start("tiny.yaml", "data.dataset=moving", "train.tokens=512", name="moved")
    prepare(source, "train:320", folder, val_fraction=0.2, overwrite=True)
    with pytest.raises(DataError, match=r"data/moving is not the data that .*step_000002 was trained on"):
        resume("moved", "train.tokens=768")


def test_latest_moves_when_training_begins_and_survives_being_resumed(workspace):
    start("tiny.yaml", "train.tokens=256", name="older")
    start("tiny.yaml", "train.tokens=256", name="newer")
    reopen_run("older", [])
    assert find_run().name == "newer"
    for reference in ("latest", str(workspace / "runs" / "latest"), "runs/latest"):
        resume(reference, "train.tokens=512")
        assert find_run().name == "newer"
        assert checkpoint.newest_checkpoint(find_run()).name == "step_000002"
    resume("older")
    assert find_run().name == "older"


def test_automatic_micro_batches_fit_a_gpus_memory(monkeypatch):
    recipe = load_recipe("lightlm")
    for gigabytes, sequences in ((80, 16), (24, 4), (1, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, n=gigabytes: (n * 2**30, n * 2**30))
        assert micro_batch_size(recipe, torch.device("cuda")) == sequences


def test_a_resumed_run_gets_the_micro_batch_of_a_new_one(monkeypatch):
    """On a GPU it follows from free memory, which the optimizer's state of a checkpoint would reduce."""
    state, plain = [], setup.load_named_state
    monkeypatch.setattr(setup, "load_named_state", lambda *given: plain(*given) or state.append(given))
    monkeypatch.setattr(setup, "micro_batch_size", lambda *_, **__: 1 if state else 2)
    _, watch = start(name="roomy", watch=Recorder(terminate_at=1))
    _, rest = resume("roomy", "train.tokens=2560")
    assert state
    assert (watch.facts["micro_batch"], rest.facts["micro_batch"]) == (2, 2)


def test_automatic_micro_batches_fit_the_machines_memory(monkeypatch):
    recipe = load_recipe("lightlm", ["model.vocab_size=50257", "train.seq_len=512"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    sizes = {}
    for gigabytes, processes in ((64, 1), (10, 1), (6, 1), (1, 1), (64, 16)):
        monkeypatch.setattr(gradients, "memory", lambda n=gigabytes: n * 2**30)
        sizes[gigabytes, processes] = micro_batch_size(recipe, torch.device("cpu"), processes, dtype=torch.float32)
    assert sizes[64, 1] == 4096 // 512
    assert sizes[64, 1] >= sizes[10, 1] > sizes[6, 1] >= sizes[1, 1] == 1
    assert sizes[64, 16] < sizes[64, 1], "processes share it"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(gradients, "memory", lambda: 10 * 2**30)
    assert micro_batch_size(recipe, torch.device("cpu"), 16, dtype=torch.float32) == sizes[10, 1], "one per machine"


def test_compiling_on_a_cpu_waits_for_a_run_that_pays(monkeypatch):
    cpu, model = torch.device("cpu"), Transformer(dataclasses.replace(load_recipe("tiny.yaml").model, vocab_size=320))
    bf16 = torch.bfloat16
    monkeypatch.setattr(compilation, "_has_compiler", lambda: True)
    monkeypatch.setattr(compilation, "_TORCH", Path("/home/me/.venv/lib/torch"))
    monkeypatch.setattr(compilation, "has_slow_mkl", lambda: True)
    monkeypatch.setattr(compilation.sys, "platform", "linux")
    short = load_recipe("tiny.yaml")
    long = load_recipe("tiny.yaml", ["train.tokens=100B"])
    assert not compilation.compiles(short, model, cpu, bf16)
    assert compilation.compiles(long, model, cpu, bf16)
    assert not compilation.compiles(long, model, cpu, torch.float32), "its blocks would take the slow products"
    assert compilation.compiles(short, model, torch.device("cuda"), bf16)
    assert not compilation.compiles(
        load_recipe("tiny.yaml", ["train.compile=false"]), model, torch.device("cuda"), bf16
    )
    monkeypatch.setattr(compilation, "_TORCH", Path("/home/me/my models/.venv/lib/torch"))
    assert not compilation.compiles(long, model, cpu, bf16)
    with pytest.raises(RecipeError, match="without blanks in its path"):
        compilation.compiles(load_recipe("tiny.yaml", ["train.compile=true"]), model, cpu, bf16)
    monkeypatch.setattr(compilation, "_TORCH", Path("/home/me/.venv/lib/torch"))
    monkeypatch.setattr(compilation, "_has_compiler", lambda: False)
    assert not compilation.compiles(long, model, cpu, bf16)
    with pytest.raises(RecipeError, match=r"needs a C\+\+ compiler"):
        compilation.compiles(load_recipe("tiny.yaml", ["train.compile=true"]), model, cpu, bf16)


def test_the_runs_recipe_keeps_whether_it_was_compiled(whole_run):
    assert load_recipe(whole_run[0].run / "recipe.yaml").train.compile is False


@pytest.mark.parametrize("gain", [0.5, 4.0])
def test_a_run_keeps_the_precision_that_was_measured_at_its_start(gain, workspace, monkeypatch):
    monkeypatch.setattr("lightlm.cpu.gain", lambda dtype, width: gain)
    name = f"measured-{gain}"
    result, _ = start("tiny.yaml", "train.dtype=auto", "train.tokens=256", "schedule.warmup=128", name=name)
    kept = "bfloat16" if gain > 1 else "float32"
    assert load_recipe(result.run / "recipe.yaml").train.dtype == kept
    # Resumed where the other precision is faster, it stays what it was.
    monkeypatch.setattr("lightlm.cpu.gain", lambda dtype, width: 1 / gain)
    _, watch = resume(name, "train.tokens=512")
    assert watch.facts["dtype"] == kept
    assert any("train.dtype=bfloat16: products take 4.0 times as long" in note for note in watch.notes) == (
        kept == "bfloat16"
    )


def test_a_run_that_moves_says_what_it_keeps_and_chooses_anew_if_asked(workspace, monkeypatch):
    monkeypatch.setattr("lightlm.cpu.gain", lambda dtype, width: 4.0)
    start("tiny.yaml", "train.dtype=auto", "train.tokens=256", "schedule.warmup=128", name="other-computer")
    assert not any("another computer" in note for note in resume("other-computer", "train.tokens=512")[1].notes)
    monkeypatch.setattr("lightlm.machine.cpu_features", lambda: "abacus")
    monkeypatch.setattr("lightlm.cpu.gain", lambda dtype, width: 1.0)
    _, watch = resume("other-computer", "train.tokens=768")
    assert any("another computer" in note and "train.dtype=auto" in note for note in watch.notes)
    assert watch.facts["dtype"] == "bfloat16"
    anew = ("train.dtype=auto", "train.threads=auto", "train.compile=auto")
    _, watch = resume("other-computer", "train.tokens=1024", *anew)
    assert watch.facts["dtype"] == "float32"
    assert not any("another computer" in note for note in watch.notes), "its last steps are of this one"


def test_a_run_keeps_the_threads_that_were_measured_at_its_start(workspace, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("lightlm.cpu.cores", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr("lightlm.cpu.fastest_threads", lambda most, *_: 1)
        result, watch = start("tiny.yaml", "train.tokens=256", "schedule.warmup=128", name="threads")
        assert load_recipe(result.run / "recipe.yaml").train.threads == torch.get_num_threads() == 1
        assert any("1 of 2 threads" in note for note in watch.notes)
        torch.set_num_threads(2)
        monkeypatch.setattr("lightlm.cpu.fastest_threads", lambda most, *_: most)
        resume("threads", "train.tokens=512")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
