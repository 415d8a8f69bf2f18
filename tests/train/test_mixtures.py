"""Runs on mixtures: kills, processes and extensions keep the order; losses, tokens and epochs per source."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.data.training_data import TrainingData
from lightlm.errors import DataError, RecipeError
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.planning.plan import make_plan
from lightlm.train.schedules import source_order
from lightlm.train.setup import open_data, set_up
from tests.corpus import make_workspace, texts
from tests.train.group import together, train_together
from tests.train.watch import Recorder, comparable, resume, start

# 20 steps of 8 sequences; the stage changes within step 13. Checkpoints after steps 5, 10, 15 and 20.
STAGES = "data.stages=[{until: 3296, mix: {tiny: 0.7, poems: 0.3}}, {mix: {tiny: 1, poems: 3}}]"
SHORT = (STAGES, "eval.prompts=[]")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A workspace with a second data folder, data/poems, and one of another tokenizer, data/other."""
    folder = make_workspace(tmp_path_factory.mktemp("mixtures"))
    (folder / "poems.txt").write_text("\n\n".join(texts(40, seed=5)), encoding="utf-8")
    tokenizer = str(folder / "data/tiny/tokenizer.json")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(30, seed=5))
    (folder / "poems.jsonl").write_text(lines, encoding="utf-8")
    prepare(str(folder / "poems.jsonl"), tokenizer, folder / "data/poems", val_fraction=0.2)
    prepare(str(folder / "poems.jsonl"), "train:300", folder / "data/other", val_fraction=0.2)
    return folder


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def whole(workspace):
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return start("tiny.yaml", *SHORT, name="mixture-whole")[1]


def weights(name):
    return load_file(checkpoint.newest_checkpoint(RUNS / name) / "model.safetensors")


def test_metrics_count_the_tokens_of_each_source_exactly(whole):
    assert [part["name"] for part in whole.facts["sources"]] == ["tiny", "poems"]
    for row in whole.metrics:
        sequences = row["tokens"] // 32
        first = min(sequences, 103)
        due = [0.7 * first + 0.25 * (sequences - first), 0.3 * first + 0.75 * (sequences - first)]
        counts = [row["tokens/tiny"] / 32, row["tokens/poems"] / 32]
        assert sum(counts) == sequences
        assert np.abs(np.subtract(counts, due)).max() <= 0.5
    planned = [(part["name"], part["tokens"]) for part in whole.facts["sources"]]
    assert planned == [(name, whole.metrics[-1][f"tokens/{name}"]) for name in ("tiny", "poems")]
    for part in whole.facts["sources"]:
        stream = DataFolder.open(f"data/{part['name']}").split("train")
        assert part["train_tokens"] == len(stream)
        assert part["epochs"] == part["tokens"] / 32 / ((len(stream) - 1) // 32)


def test_validation_weighs_the_sources_by_the_last_stage(whole):
    found = [row for row in whole.metrics if "val_loss" in row]
    assert [row["step"] for row in found] == [10, 20]
    for row in found:
        expected = 0.25 * row["val_loss/tiny"] + 0.75 * row["val_loss/poems"]
        assert row["val_loss"] == pytest.approx(expected, rel=1e-12)
        low, high = sorted((row["val_bpb/tiny"], row["val_bpb/poems"]))
        assert low <= row["val_bpb"] <= high
    alone = start("tiny.yaml", "data.dataset=poems", "eval.tokens=512", "train.tokens=256", name="alone")[1]
    assert set(alone.metrics[-1]) & {"val_loss", "val_loss/poems", "tokens/poems"} == {"val_loss"}


@pytest.mark.parametrize("step", [8, 13])
def test_a_run_stopped_before_or_after_a_stage_resumes_bit_for_bit(whole, step):
    name = f"stopped-{step}"
    before = start("tiny.yaml", *SHORT, name=name, watch=Recorder(terminate_at=step))
    assert before[0].interrupted
    after = resume(f"runs/{name}")
    assert comparable(before[1].metrics + after[1].metrics) == comparable(whole.metrics)
    first, second = weights(name), weights("mixture-whole")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
def test_two_processes_and_any_micro_batch_read_the_same(whole):
    metrics = together(2, train_together, "world-2", SHORT)[0][0]
    one = start("tiny.yaml", *SHORT, "train.micro_batch_size=8", name="micro-8")[1].metrics
    for other in (metrics, one):
        assert [row["tokens/poems"] for row in other] == [row["tokens/poems"] for row in whole.metrics]
        for a, b in zip(other, whole.metrics, strict=True):
            for key in ("loss", "val_loss", "val_loss/poems", "val_bpb"):
                assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), abs=1e-5)


def test_a_dataset_of_a_recipe_gives_the_losses_of_a_mix_of_one(whole):
    one = start("tiny.yaml", "train.tokens=1024", name="dataset")[1]
    mix = start("tiny.yaml", "train.tokens=1024", "data.mix={./data/tiny: 3}", name="mix-of-one")[1]
    assert comparable(one.metrics) == comparable(mix.metrics)


def test_what_a_run_has_read_cannot_change_and_what_comes_can(whole, workspace):
    def reopen(*overrides):
        return reopen_run("runs/mixture-longer", overrides, lambda note: None)[0]

    start("tiny.yaml", STAGES.replace("3296", "80%"), "eval.every=0", name="mixture-longer")
    with pytest.raises(RecipeError, match=r"data\.stages would .* write `until` in tokens \(4096\)"):
        reopen("train.tokens=10240")
    with pytest.raises(RecipeError, match="begin changes of the mixture later"):
        reopen("data.mix={tiny: 0.5, poems: 0.5}")
    with pytest.raises(RecipeError, match=r"data\.shift_windows cannot change"):
        reopen("data.shift_windows=true")
    notes: list[str] = []
    reopen_run("runs/mixture-longer", ["data.stages.0.until=4096", "train.tokens=10240"], notes.append)
    with pytest.raises(RecipeError, match=r"data\.mix would give other sources"):
        reopen_run("runs/mixture-longer", ["data.mix.poems=1"], notes.append)
    assert not [note for note in notes if "has changed and is followed" in note]
    fixed = STAGES.replace("3296", "4096")
    assert reopen(fixed, "train.tokens=10240").train.tokens == 10240
    shutil.copytree("data/tiny", "moved", dirs_exist_ok=True)
    moved = STAGES.replace("tiny", "./moved").replace("3296", "80%")
    further = fixed.replace("{mix: {tiny: 1, poems: 3}}", "{until: 90%, mix: {tiny: 1, poems: 3}}, {dataset: poems}")
    assert resume("runs/mixture-longer", moved)[0].step == 20
    assert resume("runs/mixture-longer", further, "train.tokens=10240", "eval.every=0")[0].step == 40
    with pytest.raises(DataError, match="is not the data"):
        resume("runs/mixture-longer", further.replace("tiny", "?").replace("poems", "tiny").replace("?", "poems"))


def test_a_run_on_one_dataset_can_end_on_a_mixture(whole):
    """Its order until there is that of the run on one data set."""
    start("tiny.yaml", "eval.every=0", name="trunk", watch=Recorder(terminate_at=4))
    branch = "data.stages=[{until: 2048, dataset: tiny}, {mix: {tiny: 1, poems: 1}}]"
    after = resume("runs/trunk", branch)[1].metrics
    fresh = start("tiny.yaml", branch, "eval.every=0", name="branch")[1].metrics
    drop = {"val_loss", "val_bpb", "val_loss/tiny", "val_loss/poems", "val_bpb/tiny", "val_bpb/poems"}
    left, right = ([{k: row[k] for k in row if k not in drop} for row in comparable(m)] for m in (after, fresh[4:]))
    assert left == right


def test_a_stage_and_a_decay_begin_at_the_same_token(workspace):
    recipe = load_recipe(
        "tiny.yaml", ["train.tokens=5000", "data.stages=[{until: 80%, dataset: tiny}, {dataset: poems}]"]
    )
    counts = source_order(recipe).counts(5120 // 32)  # 5,000 tokens are 20 batches of 256
    assert counts.tolist() == [128, 32]  # the decay is 20% of the same 5,120
    later = recipe.data.model_copy(
        update={"stages": [recipe.data.stages[0].model_copy(update={"until": "4097"}), recipe.data.stages[1]]}
    )
    counts = source_order(recipe.model_copy(update={"data": later})).counts(5120 // 32)
    assert counts.tolist() == [129, 31]  # a sequence belongs to the stage in which it begins


def test_folders_that_cannot_be_mixed_are_refused(workspace):
    def open_mix(mix):
        return TrainingData.open(load_recipe("tiny.yaml", [f"data.mix={mix}"], lambda note: None).data)

    with pytest.raises(DataError, match=r"data/tiny and data/other have different tokenizers .*320.*300"):
        open_mix("{tiny: 1, other: 1}")
    with pytest.raises(DataError, match="one folder"):
        open_mix("{tiny: 1, ./data/tiny: 1}")
    with pytest.raises(DataError, match=r"(?s)data/nope\..*data/nada\."):
        open_mix("{tiny: 1, nope: 1, nada: 1}")
    assert list(open_mix("{tiny: 1, nope: 0}").folders) == ["tiny"]


def test_repeats_and_idle_shifts_are_noted(workspace):
    def notes(*overrides):
        found = []
        recipe = load_recipe("tiny.yaml", overrides, lambda note: None)
        set_up(recipe, open_data(recipe), found.append)
        return "\n".join(found)

    tokens = len(DataFolder.open("data/poems").split("train"))
    often = notes("data.mix={tiny: 1, poems: 1}", f"train.tokens={24 * tokens}")
    assert "tokens of poems 12 times" in often
    assert "tokens of tiny" not in often
    assert "too_long=drop has no effect" in notes("data.too_long=drop")
    assert "shift_windows has no effect" in notes("data.shift_windows=true", "train.tokens=256")
    assert "shift_windows" not in notes("data.shift_windows=true", f"train.tokens={24 * tokens}", "data.dataset=poems")


def test_a_plan_says_what_is_repeated_before_all_is_prepared(workspace):
    recipe = load_recipe("tiny.yaml", ["data.mix={poems: 3, nope: 1}", "train.tokens=51200"], lambda note: None)
    plan = make_plan(recipe, probe=False)
    poems, nope = plan["run"]["sources"]
    assert (poems["tokens"], nope["tokens"]) == (38400, 12800)
    assert poems["epochs"] == 38400 / len(DataFolder.open("data/poems").split("train"))
    assert nope["epochs"] is None
    assert plan["model"]["vocab_size"] == DataFolder.open("data/poems").manifest.vocab_size
    command = r"data/nope is not prepared yet.* prepare-data nope --tokenizer data/poems/tokenizer\.json"
    assert any(re.match(command, note) for note in plan["notes"])
    assert math.isclose(sum(part["tokens"] for part in plan["run"]["sources"]), plan["run"]["tokens"])
