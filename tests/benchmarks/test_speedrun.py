"""benchmarks/speedrun.py on a stand-in for nanoGPT: what it hands over, how it resumes, and the export of the model."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from lightlm.convert.load import load_pretrained
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from tests.corpus import texts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# GPT-2 as a formula over a dictionary of weights with nanoGPT's names, in its two files.
MODEL = """
import math
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True

def forward(w, shape, ids):
    def norm(x, name):
        return F.layer_norm(x, (shape.n_embd,), w[name + ".weight"], w.get(name + ".bias"))
    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    for i in range(shape.n_layer):
        b = f"transformer.h.{i}."
        q, k, v = linear(norm(x, b + "ln_1"), b + "attn.c_attn").split(shape.n_embd, dim=2)
        heads = [t.unflatten(2, (shape.n_head, -1)).transpose(1, 2) for t in (q, k, v)]
        score = heads[0] @ heads[1].mT / math.sqrt(shape.n_embd // shape.n_head)
        mask = torch.ones(score.shape[-2:]).triu(1).bool()
        mixed = score.masked_fill(mask, -math.inf).softmax(-1) @ heads[2]
        x = x + linear(mixed.transpose(1, 2).flatten(2), b + "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, b + "ln_2"), b + "mlp.c_fc")), b + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T

class GPT:
    def __init__(self, config):
        self.config = config
    def eval(self):
        return self
    def load_state_dict(self, weights):
        self.weights = weights
    def __call__(self, ids, targets):
        logits = forward(self.weights, self.config, ids)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
# It copies checkpoints that the test has written, and does not import torch, which takes seconds.
TRAIN = """
import ast, json, os, pickle, shutil, sys

c = {}
for a in sys.argv[1:]:
    key, value = a[2:].split("=", 1)
    try:
        c[key] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        c[key] = value
assert os.path.getsize(os.path.join("data", c["dataset"], "train.bin")) > 1000
assert pickle.load(open(os.path.join("data", c["dataset"], "meta.pkl"), "rb"))["vocab_size"] == 320
os.makedirs(c["out_dir"], exist_ok=True)
out = os.path.join(c["out_dir"], "ckpt.pt")
first = int(open(out + ".step").read()) if c.get("init_from") == "resume" else 0
for i in range(first, c["max_iters"] + 1):
    if i % c["eval_interval"] == 0:
        print(f"step {i}: train loss 3.0000, val loss 3.1000")
        if i > 0:
            shutil.copy(f"{i}.pt", out)
            open(out + ".step", "w").write(str(i))
            if os.path.exists("die"):
                os.remove("die")
                sys.exit(1)
    print(f"iter {i}: loss 3.0000, time {9000 if i % c['eval_interval'] == 0 else 2000:.2f}ms, mfu 1.00%", flush=True)
json.dump(c, open(os.path.join(c["out_dir"], "seen.json"), "w"))
"""


def checkpoint(bias):
    """What nanoGPT saves, without its `iter_num`; large weights, so that a mistake shows."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": bias, "vocab_size": 320, "dropout": 0.0}
    sizes = {"transformer.wte": (320, 16), "transformer.wpe": (32, 16)}
    for layer in ("transformer.h.0", "transformer.h.1"):
        sizes |= {f"{layer}.ln_1": (16,), f"{layer}.attn.c_attn": (48, 16), f"{layer}.attn.c_proj": (16, 16)}
        sizes |= {f"{layer}.ln_2": (16,), f"{layer}.mlp.c_fc": (64, 16), f"{layer}.mlp.c_proj": (16, 64)}
    sizes["transformer.ln_f"] = (16,)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, size in sizes.items():
        weights[f"{name}.weight"] = 0.5 * torch.randn(size, generator=generator) + (len(size) == 1)
        if bias and ".w" not in name:
            weights[f"{name}.bias"] = 0.5 * torch.randn(size[0], generator=generator)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {"model": {f"_orig_mod.{name}": value for name, value in weights.items()}, "model_args": shape}


@pytest.fixture
def speedrun(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speedrun

    return speedrun


@pytest.fixture
def options(tmp_path, request):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(80)), encoding="utf-8")
    prepare(str(tmp_path / "text.jsonl"), "train:320", tmp_path / "data", val_fraction=0.3)
    code = tmp_path / "nanoGPT"
    code.mkdir()
    (code / "train.py").write_text(TRAIN, encoding="utf-8")
    (code / "model.py").write_text(MODEL, encoding="utf-8")
    for step in range(5, 35, 5):
        torch.save(checkpoint(getattr(request, "param", True)) | {"iter_num": step}, code / f"{step}.pt")
    small = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 2}
    work = tmp_path / "work"
    return argparse.Namespace(
        work=work,
        data=tmp_path / "data",
        nanogpt=code,
        minutes=1.0,
        set=small,
        recipe="recipe",
        overrides=[],
        tasks="heldout",
        limit=None,
        heldout=None,
        data_dir=None,
    )


def test_nanogpts_files_hold_the_tokens_of_the_folder(speedrun, options, tmp_path):
    assert speedrun.write_nanogpt_data(options.data, tmp_path / "bin") == 320
    folder = DataFolder.open(options.data)
    for split in ("train", "val"):
        stream = folder.split(split)
        found = np.fromfile(tmp_path / "bin" / f"{split}.bin", dtype=np.uint16)
        np.testing.assert_array_equal(found, stream.slice(0, len(stream)))


def test_the_plan_fills_the_limit_and_ends_with_a_checkpoint(speedrun):
    for minutes, seconds in ((60, 0.35), (1, 0.7), (0.01, 2.0)):
        plan = speedrun.plan_nanogpt(minutes, seconds)
        assert plan["max_iters"] % plan["eval_interval"] == 0
        assert plan["max_iters"] >= 1
        if minutes * 60 > 20 * seconds:
            assert 0.8 * minutes * 60 < plan["max_iters"] * seconds <= minutes * 60


def test_nanogpt_trains_to_its_end_after_an_interruption_and_its_model_is_exported(speedrun, options):
    options.work.mkdir()
    (options.work / "nanogpt").mkdir()
    (options.nanogpt / "die").touch()
    with pytest.raises(SystemExit, match="the same command resumes"):  # the probe has no checkpoint, so it survives
        speedrun.train("nanogpt", options)
    trained = speedrun.train("nanogpt", options)
    seen = json.loads((options.work / "nanogpt" / "seen.json").read_text(encoding="utf-8"))
    # 2 s per iteration: 30 fill a minute. The schedule ends where the training ends.
    assert (seen["max_iters"], seen["lr_decay_iters"], seen["init_from"]) == (30, 30, "resume")
    assert seen["min_lr"] == pytest.approx(0.1 * seen["learning_rate"])
    assert (seen["device"], seen["n_embd"], seen["batch_size"]) == ("cpu", 16, 2)
    assert (trained.tokens, trained.seconds) == (30 * 2 * 32, pytest.approx(60.0))
    assert trained.facts["loss"] == pytest.approx(trained.facts["loss_exported"], abs=0.01)
    # The folder's model gives what nanoGPT's formula gives with its tanh approximation of GELU.
    saved = speedrun.load_nanogpt(options.work / "nanogpt" / "ckpt.pt")
    weights = {key.removeprefix("_orig_mod."): value for key, value in saved["model"].items()}
    scope = {}
    exec(MODEL.replace("F.gelu(", "F.gelu(approximate='tanh', input="), scope)
    ids = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = scope["forward"](weights, scope["GPTConfig"](**saved["model_args"]), ids)
    loaded = load_pretrained(trained.model, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids), expected, rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer.sha256 == DataFolder.open(options.data).tokenizer.sha256
    # Nothing is trained again.
    (options.work / "nanogpt" / "ckpt.pt").unlink()
    (options.nanogpt / "train.py").unlink()
    assert speedrun.train("nanogpt", options) == trained


@pytest.mark.parametrize("options", [False], indirect=True)
def test_an_export_with_another_loss_is_refused(speedrun, options, monkeypatch):
    options.work.mkdir()
    trained = speedrun.train("nanogpt", options)
    assert trained.facts["loss"] == pytest.approx(trained.facts["loss_exported"], abs=0.01)
    place = options.work / "nanogpt"
    monkeypatch.setattr(functional, "gelu", torch.relu)
    with pytest.raises(SystemExit, match="another loss"):
        speedrun.export_nanogpt(place / "ckpt.pt", options, place / "hf2")
    assert not (place / "hf2").exists()


def test_an_evaluation_does_not_count_as_time_of_training(speedrun, tmp_path):
    log = tmp_path / "log"
    lines = ["step 0: train loss 9.0000, val loss 9.0000", "iter 0: loss 9.0, time 50000.00ms, mfu -100.00%"]
    lines += [f"iter {i}: loss 8.0, time {1000 + i:.2f}ms, mfu 1.00%" for i in (1, 2, 3)]
    lines += ["step 2: train loss 9.0000, val loss 9.0000", "iter 2: loss 9.0, time 70000.00ms, mfu 1.00%"]
    lines += ["iter 3: loss nan, time 1500.00ms, mfu 1.00%", "iter 4: loss 8.0, time 1001.00ms, mfu 1.00%"]
    log.write_text("\n".join(lines), encoding="utf-8")
    median = np.median([50.0, 1.001, 70.0, 1.5, 1.001])
    assert speedrun.iteration_seconds(log) == pytest.approx([median, 1.001, median, 1.5, 1.001])


def test_a_folder_keeps_what_it_was_started_with(speedrun, options, monkeypatch):
    speedrun.check_work(options)
    speedrun.check_work(options)
    options.minutes = 2.0
    with pytest.raises(SystemExit, match=r"started with minutes 1\.0; give another --work"):
        speedrun.check_work(options)
    options.minutes = 1.0
    monkeypatch.setattr("lightlm.machine.processor", lambda: "Abacus")  # an hour of another machine
    with pytest.raises(SystemExit, match=r"started with machine .*; give another --work"):
        speedrun.check_work(options)


def test_settings_of_nanogpt_are_checked(speedrun):
    assert speedrun.parse_setting("learning_rate=1e-3") == ("learning_rate", 0.001)
    assert speedrun.parse_setting("compile=False") == ("compile", False)
    for text, message in (("lr=1e-3", "learning_rate"), ("n_layer=six", "write n_layer=6")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            speedrun.parse_setting(text)


def test_the_table_has_a_row_per_contestant_with_the_scores_that_are_known(speedrun):
    scores = {"heldout": {"bits_per_byte,none": 1.5}, "piqa": {"acc_norm,none": 0.55, "acc_norm_stderr,none": 0.01}}
    entry = {"facts": {"parameters": 1000}, "tokens": 50_000, "seconds": 90.0, "scores": scores}
    nan = {"heldout": {"bits_per_byte,none": 1.75, "bits_per_byte_stderr,none": math.nan}}
    lines = speedrun.table({"lightlm": entry, "nanogpt": entry | {"scores": nan}}).splitlines()
    assert lines[0] == "|  | parameters | tokens | minutes | bits per byte | PIQA acc_norm |"
    assert lines[2] == "| lightlm | 1,000 | 50,000 | 1.5 | 1.500 | 0.550 ± 0.010 |"
    assert lines[3] == "| nanogpt | 1,000 | 50,000 | 1.5 | 1.750 |  |"
