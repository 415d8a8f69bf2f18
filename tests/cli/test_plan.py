import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lightlm.data.prepare.run import prepare
from lightlm.model.transformer import Transformer
from lightlm.quantities import format_quantity
from lightlm.recipe import load_recipe
from tests.corpus import TINY_RECIPE, make_data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return tmp_path


def in_a_process(*arguments):
    """A process of its own: a peak of memory is this command's alone."""
    done = subprocess.run([sys.executable, "-m", "lightlm", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds depends on the C library; measured on Linux")
def test_a_demo_run_takes_what_was_planned(folder):
    make_data(folder)
    # Long enough to save once before the end, which takes a copy of weights and optimizer state.
    demo = ["demo", "data.dataset=tiny", "model.vocab_size=8192", "train.tokens=16K", "checkpoint.every=8K"]
    demo += ["eval.tokens=4K", "eval.prompts=[]"]
    plan = in_a_process("plan", *demo, "--json")
    result = in_a_process("train", *demo, "--json")

    rows = [json.loads(line) for line in (folder / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert plan["run"]["steps"] == len(rows) == result["step"]
    assert plan["run"]["tokens"] == result["tokens"]
    weights = load_file(folder / "runs/demo/checkpoints/step_000004/model.safetensors")
    assert plan["model"]["parameters"] == sum(weight.numel() for weight in weights.values())
    memory = max(row["memory"] for row in rows)
    parts = plan["machine"]["memory"]
    assert sum(parts.values()) == 2 * parts["total"]
    assert parts["checkpoint_copy"] == parts["weights"] + parts["optimizer"]
    assert parts["total"] == pytest.approx(memory, rel=0.15)
    assert plan["machine"]["measured"]["memory"] == pytest.approx(memory, rel=0.15)


def test_a_plan_needs_no_data_and_leaves_nothing_behind(lightlm, folder):
    plan = json.loads(lightlm("plan", "tiny.yaml", "--json").stdout)
    assert plan["model"]["vocab_size"] == 50_257
    assert any("data/tiny is not prepared yet" in note and "50,257" in note for note in plan["notes"])
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]

    measured, run = plan["machine"]["measured"], plan["run"]
    # 5,120 tokens in batches of 256, in micro-batches of 2 x 32; validated at 2,560 tokens and at the end.
    assert (run["steps"], run["validations"], plan["machine"]["accumulation"]) == (20, 2, 4)
    assert measured["step_seconds"] == pytest.approx(4 * measured["pass_seconds"] + measured["update_seconds"])
    passes = run["validation_tokens"] / 64
    seconds = run["steps"] * measured["step_seconds"] + passes * measured["forward_seconds"]
    assert measured["hours"] == pytest.approx(seconds / 3600)


def test_data_that_models_are_only_scored_on_is_named(lightlm, folder):
    make_data(folder)
    prepare("tiny.jsonl", "data/tiny", "data/scored", val_fraction=1.0)
    overrides = ("tiny.yaml", "data.dataset=scored", "data.document_mask=true")
    assert "512 tokens, no train split" in " ".join(lightlm("plan", *overrides, "train.tokens=512").stdout.split())
    lightlm("train", *overrides).assert_one_message("scored has no train split: it is for scoring models only")


def test_the_vocabulary_comes_from_prepared_data(lightlm, folder):
    make_data(folder, 100)
    plan = json.loads(lightlm("plan", "tiny.yaml", "--no-probe", "--json").stdout)
    assert plan["model"]["vocab_size"] == 320
    assert plan["machine"]["measured"] is None
    assert any("not probed" in note for note in plan["notes"])


def test_gpus_get_what_fits_them(lightlm, folder):
    plan = json.loads(lightlm("plan", "lightlm", "--no-probe", "--json").stdout)
    gpus = {row["gpu"]: row for row in plan["gpus"]}
    assert gpus["H100"]["micro_batch"] > gpus["L4"]["micro_batch"]
    assert all(row["fits"] and row["memory"] < 0.9 * row["device_memory"] for row in gpus.values())
    # 10B tokens; validation adds less than a hundredth.
    seconds = 10e9 * plan["model"]["flops_per_token"] / (989e12 * gpus["H100"]["utilization"])
    assert gpus["H100"]["hours"] == pytest.approx(seconds / 3600, rel=0.05)
    # More bandwidth for the same peak, and wider products on the same chip, come closer to the peak.
    demo = json.loads(lightlm("plan", "demo", "--no-probe", "--json").stdout)
    narrow = {row["gpu"]: row["utilization"] for row in demo["gpus"]}
    for gpu, row in gpus.items():
        assert 0 < narrow[gpu] < row["utilization"] < 1
    assert gpus["H100"]["utilization"] < gpus["H200"]["utilization"]

    large = ["plan", "lightlm", "train.micro_batch_size=256", "train.dtype=float32", "--no-probe", "--json"]
    plan = json.loads(lightlm(*large).stdout)
    assert not any(row["fits"] for row in plan["gpus"])
    assert all(row["hours"] is None for row in plan["gpus"])  # no table of fp32 peaks


def test_a_missing_device_is_planned_for_and_an_unknown_one_refused(lightlm, folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = json.loads(lightlm("plan", "tiny.yaml", "train.dtype=auto", "--device", "cuda", "--json").stdout)
    assert plan["machine"]["measured"] is None
    assert plan["machine"]["dtype"] == "bfloat16"
    assert "process" not in plan["machine"]["memory"]  # a GPU's memory alone
    assert any("not probed: device 'cuda' is not available" in note for note in plan["notes"])
    monkeypatch.setattr("lightlm.device.has_fast_bf16", lambda kind, width=0: kind == "cpu")
    plan = json.loads(lightlm("plan", "tiny.yaml", "train.dtype=auto", "--device", "mps", "--json").stdout)
    assert plan["machine"]["dtype"] == "float32"  # a Mac's, not this processor's
    lightlm("plan", "tiny.yaml", "--device", "tpu").assert_one_message("unknown device 'tpu'")


def test_the_table_names_every_part(lightlm, folder):
    text = lightlm("plan", "demo", "--no-probe", "eval.tasks=[heldout]").stdout
    for words in (
        "parameters",
        "FLOPs per token",
        "activations of a micro-batch",
        "logits",
        "H100",
        "60% of the bf16",
        "of peak",
    ):
        assert words in text, words
    assert "leave out eval.tasks (heldout)" in text


def test_experts_cost_what_is_active(lightlm, folder):
    """Eight experts of which two are used: the operations of a dense network of two experts' size, and a router's."""
    dense = json.loads(lightlm("plan", "tiny.yaml", "--no-probe", "--json").stdout)["model"]
    experts = ["model.num_experts=8", "model.num_experts_per_tok=2", "model.moe_intermediate_size=32"]
    sparse = json.loads(lightlm("plan", "tiny.yaml", *experts, "--no-probe", "--json").stdout)["model"]
    routers = 2 * 8 * 32
    assert sparse["active_parameters"] == dense["parameters"] + routers
    assert sparse["parameters"] == sparse["active_parameters"] + 2 * 6 * 3 * 32 * 32
    assert sparse["flops_per_token"] == dense["flops_per_token"] + 6 * routers
    table = lightlm("plan", "tiny.yaml", *experts, "--no-probe").stdout
    for key, name in (("parameters", "parameters"), ("active_parameters", "active per token")):
        assert re.search(rf"^ *{name} +{re.escape(format_quantity(sparse[key]))} *$", table, re.MULTILINE)


def test_a_probe_that_dies_leaves_the_estimate(lightlm, folder, monkeypatch):
    failed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr("lightlm.train.planning.probe.subprocess.run", lambda *_, **__: failed)
    plan = json.loads(lightlm("plan", "tiny.yaml", "--json").stdout)
    assert plan["machine"]["measured"] is None
    assert plan["machine"]["memory"]["total"] > 0
    assert any("exit code -9" in note and "memory" in note for note in plan["notes"])


def test_every_shipped_recipe_can_be_planned(lightlm, folder):
    for name in ("gpt2-124m", "gpt3-125m", "mobilellm-ls-125m"):
        plan = json.loads(lightlm("plan", name, "--no-probe", "--json").stdout)
        assert plan["run"]["tokens"] >= load_recipe(name).train.tokens


def test_heads_of_multi_token_prediction_are_counted(lightlm, folder):
    plain, ahead = (
        json.loads(lightlm("plan", "tiny.yaml", *more, "--no-probe", "--json").stdout)
        for more in ((), ("train.mtp.depth=1",))
    )
    config = load_recipe("tiny.yaml").model
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, vocab_size=plain["model"]["vocab_size"]), 1)
    heads = model.mtp_parameters
    assert (plain["model"]["mtp_parameters"], ahead["model"]["mtp_parameters"]) == (0, heads)
    assert plain["model"]["parameters"] == ahead["model"]["parameters"]
    assert ahead["model"]["flops_per_token"] == model.flops_per_token(32) > plain["model"]["flops_per_token"]
    before, after = plain["machine"]["memory"], ahead["machine"]["memory"]
    assert after["weights"] - before["weights"] == after["gradients"] - before["gradients"] == 4 * heads
    assert after["optimizer"] - before["optimizer"] == 8 * heads
    assert after["activations"] > before["activations"]
    assert after["logits"] > before["logits"]
    assert ahead["inference"] == plain["inference"]
    assert all(b["memory"] > a["memory"] for a, b in zip(plain["gpus"], ahead["gpus"], strict=True))
    assert "multi-token prediction" in lightlm("plan", "tiny.yaml", "train.mtp.depth=1", "--no-probe").stdout


def test_a_validation_at_every_step_is_counted_once_per_step(lightlm, folder):
    run = json.loads(lightlm("plan", "tiny.yaml", "eval.every=1", "--no-probe", "--json").stdout)["run"]
    assert run["validations"] == run["steps"] == 20


def test_the_validation_of_a_model_before_its_first_step_is_counted(lightlm, folder):
    make_data(folder)
    lightlm("train", "tiny.yaml", "train.tokens=256", "--name", "started")
    more = ("train.init_from=started", "model={}")
    new, further = (
        json.loads(lightlm("plan", "tiny.yaml", *m, "--no-probe", "--json").stdout)["run"] for m in ((), more)
    )
    assert further["validations"] == new["validations"] + 1


def test_what_a_gpu_computes_again_or_hides_takes_its_time(lightlm, folder):
    def hours(*more):
        plan = lightlm("plan", "gpt2-124m", "train.dtype=bfloat16", *more, "--no-probe", "--json").stdout
        return json.loads(plan)["gpus"][0]["hours"]

    plain = hours()
    assert 1.1 * plain < hours("train.activation_checkpointing=true") < 1.34 * plain
    assert hours("model.sliding_window=128") > plain, "dense masks hide scores, and skip none"


def test_a_training_that_exceeds_the_memory_is_noted(lightlm, folder, monkeypatch):
    monkeypatch.setattr("lightlm.train.planning.plan.memory", lambda: 10**8)
    plan = json.loads(lightlm("plan", "tiny.yaml", "--no-probe", "--json").stdout)
    assert any("and this process may use 0.1: the system would end it" in note for note in plan["notes"])


@pytest.mark.parametrize("seed", [-1, -(2**63)])
def test_a_negative_seed_is_planned(lightlm, folder, seed):
    plan = json.loads(lightlm("plan", "tiny.yaml", f"train.seed={seed}", "--json").stdout)
    assert plan["machine"]["measured"] is not None


def test_a_save_by_the_clock_is_counted_where_the_run_may_be_that_long(lightlm, folder):
    def copy(*more):
        plan = json.loads(lightlm("plan", "tiny.yaml", "checkpoint.every=0", *more, "--json").stdout)
        return plan["machine"]["memory"]["checkpoint_copy"]

    assert copy("--no-probe") > 0
    assert copy("--no-probe", "checkpoint.every_minutes=0") == 0
    assert copy() == 0, "it takes seconds"
    assert copy("train.tokens=100M", "checkpoint.every_minutes=0.01") > 0


def test_an_average_of_the_weights_is_counted_here_and_in_the_copy_that_a_save_takes(lightlm, folder):
    plain, averaged = (
        json.loads(lightlm("plan", "tiny.yaml", *more, "--no-probe", "--json").stdout)
        for more in ((), ("train.ema=10%",))
    )
    before, after = plain["machine"]["memory"], averaged["machine"]["memory"]
    assert "ema" not in before
    assert after["ema"] == 4 * averaged["model"]["parameters"]
    assert after["checkpoint_copy"] - before["checkpoint_copy"] == after["ema"]
    assert averaged["run"]["validation_tokens"] == 2 * plain["run"]["validation_tokens"]
