"""Runs that learn from a teacher: what they log, how they resume, and teachers that do not fit."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from lightlm import checkpoint
from lightlm.convert.load import find_start
from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.prepare.run import prepare
from lightlm.errors import DataError, RecipeError
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.train.observe.metrics import read_metrics
from tests.cli.runner import Runner
from tests.corpus import make_workspace, write_jsonl
from tests.train.group import run_together, together, train_together
from tests.train.watch import Recorder, comparable, make_trainer, resume, start

LEARN = ("train.distill.teacher=large", "train.distill.weight=0.4", "train.distill.temperature=2")
SHORT = ("train.tokens=512", "eval.every=512", "eval.prompts=[]")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a trained run `large`, wider than tiny.yaml's model."""
    folder = make_workspace(tmp_path_factory.mktemp("distillation"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start("tiny.yaml", "model.hidden_size=48", "eval.prompts=[]", name="large")
    return folder


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def learning(*overrides):
    return load_recipe("tiny.yaml", [*LEARN, *overrides], find_start=find_start)


def train(name, *overrides, watch=None):
    watch = watch or Recorder()
    return make_trainer(learning(*overrides), name, watch).train(), watch


@pytest.fixture(scope="module")
def whole(workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return train("whole")[1]


def test_it_logs_both_losses_and_comes_closer_to_the_teacher(whole):
    first, last = whole.metrics[0], whole.metrics[-1]
    assert last["kl_loss"] < 0.5 * first["kl_loss"]
    assert last["loss"] < first["loss"]
    assert whole.facts["teacher"].startswith("runs/large/checkpoints/step_000020, ")
    assert "weight 0.4, temperature 2" in whole.facts["teacher"]
    text = (RUNS / "whole" / "recipe.yaml").read_text(encoding="utf-8")
    assert "teacher: runs/large/checkpoints/step_000020" in text
    assert "dtype: auto" not in text


def test_a_run_without_a_teacher_logs_no_divergence():
    _, watch = start("tiny.yaml", *SHORT, name="untaught")
    assert "kl_loss" not in watch.metrics[0]
    assert watch.facts["teacher"] is None


@pytest.mark.parametrize("how", ["text", "documents", "conversations"])
def test_the_teacher_sees_what_the_model_sees(how):
    """A model that starts as its own teacher has nothing to learn: the same tokens, masks and trained targets."""
    given = {"text": [], "documents": ["data.document_mask=true"]}
    if how == "conversations":
        lines = [{"prompt": f"Say {n}", "completion": f"The old clock says {n}."} for n in range(200)]
        Path("talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        prepare("talk.jsonl", "train:330", "data/answers", text_column=ChatColumns("chat"), val_fraction=0.1)
        start("tiny.yaml", "data.dataset=answers", *SHORT, name="own")
        given[how] = ["data.dataset=answers", "data.document_mask=true", "train.distill.teacher=own"]
    itself = "own" if how == "conversations" else "large"
    pure = [
        "model={}",
        f"train.init_from={itself}",
        "train.distill.weight=1",
        "train.distill.dtype=float32",
        *given[how],
        *SHORT,
    ]
    metrics = train(f"itself-{how}", *pure)[1].metrics
    assert metrics[1]["kl_loss"] < 1e-5
    assert metrics[1]["grad_norm"] < 1e-4
    assert metrics[1]["loss"] > 1


def test_a_stopped_run_resumes_exactly(whole):
    before = train("stopped", watch=Recorder(terminate_at=7))[1].metrics
    assert before[-1]["step"] == 7
    after = resume("stopped")[1].metrics
    assert comparable(before + after) == comparable(whole.metrics)
    assert comparable(read_metrics(RUNS / "stopped")) == comparable(read_metrics(RUNS / "whole"))


def test_checkpoints_do_not_hold_the_teacher(whole):
    start("tiny.yaml", *SHORT, name="plain")
    ours, theirs = (checkpoint.newest_checkpoint(RUNS / name) for name in ("whole", "plain"))
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (ours, theirs)]
    assert sizes[0] == pytest.approx(sizes[1], abs=200)


@pytest.mark.parametrize("change", ["train.micro_batch_size=8", "train.activation_checkpointing=true"])
def test_gradients_do_not_depend_on_the_passes(whole, change):
    metrics = train(f"passes-{change[6:11]}", change, *SHORT)[1].metrics
    for key in ("loss", "kl_loss", "grad_norm"):
        assert metrics[0][key] == pytest.approx(whole.metrics[0][key], rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does_and_resume_it(whole, parallel):
    name = f"two-{parallel}"
    together(
        2, run_together, learning, name, f"train.parallel={parallel}", "train.tokens=2560", "schedule.name=constant"
    )
    longer = ("train.tokens=3072",)
    metrics = together(2, train_together, name, longer, None, 0, True)[0][0]
    assert [row["step"] for row in metrics] == [11, 12]
    for ours, theirs in zip(read_metrics(RUNS / name)[:1], whole.metrics, strict=False):
        for key in ("loss", "kl_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


def test_validation_is_the_plain_loss(whole):
    """That of the same weights without a teacher, which a run may lose by an override."""
    shutil.copytree("runs/whole", "runs/alone", symlinks=True)
    metrics = resume("alone", "train.distill=null", "train.tokens=5376")[1].metrics
    assert "kl_loss" not in metrics[-1]
    own = ["model={}", "train.init_from=whole", *SHORT]
    recipe = load_recipe("tiny.yaml", own, find_start=find_start)
    watch = Recorder()
    make_trainer(recipe, "after", watch).train()
    assert watch.metrics[0]["val_loss"] == whole.metrics[-1]["val_loss"]


def test_another_teacher_is_named_when_a_run_resumes(whole):
    start("tiny.yaml", "model.hidden_size=48", "train.seed=8", *SHORT, name="other-teacher")
    shutil.copytree("runs/whole", "runs/moved", symlinks=True)
    shutil.copytree("runs/large/checkpoints/step_000020", "same-teacher")
    with pytest.raises(RecipeError, match=r"other-teacher \(train\.distill\.teacher\) is not the teacher that .*step"):
        resume("moved", "train.distill.teacher=runs/other-teacher", "train.tokens=5376")
    metrics = resume("moved", "train.distill.teacher=same-teacher", "train.tokens=5376")[1].metrics
    assert metrics[-1]["step"] == 21


def test_a_missing_teacher_is_one_message():
    with pytest.raises(RecipeError, match=r"train\.distill\.teacher: no model at nowhere"):
        learning("train.distill.teacher=nowhere")


def test_another_tokenizer_is_refused_with_what_to_do(monkeypatch, capsys):
    prepare(str(write_jsonl(Path("other.jsonl"), 100)), "train:310", "data/other", val_fraction=0.1)
    with pytest.raises(DataError) as error:
        train("mixed-up", "data.dataset=other")
    message = str(error.value)
    assert "has another tokenizer than data/other: 320 and 310 entries" in message
    assert "--tokenizer runs/large/checkpoints/step_000020" in message
    assert not Path("runs/mixed-up").exists()
    run = Runner(monkeypatch, capsys)
    Path("PROMPTS.jsonl").write_text('{"prompt": "The old clock"}\n' * 3, encoding="utf-8")
    advice = shlex.split(message.partition("train on text that the teacher writes: ")[2])
    assert run(*advice[1:], "--max-new-tokens", "8").code == 0
    assert run("prepare-data", "TEXTS.jsonl", "--tokenizer", "data/other", "--val-fraction", "0").code == 0


def test_a_context_shorter_than_a_sequence_is_refused():
    with pytest.raises(RecipeError, match=r"train\.seq_len 64 exceeds the context .* 32 tokens; set train\.seq_len=32"):
        train("long", "model.max_seq_len=64")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.distill={weight: 0.5}", r"train\.distill\.teacher: is missing"),
        ("train.distill.weight=1.5", r"train\.distill\.weight: should be less than or equal to 1, not 1\.5"),
        ("train.distill.temperature=0", r"train\.distill\.temperature: should be greater than 0, not 0"),
        ("train.distill.weight=true", r"train\.distill\.weight: should be a valid number, not 'true'"),
        ("train.distill.wieght=1", r"train\.distill\.wieght: unknown key; did you mean train\.distill\.weight\?"),
        ("train.distill=large", r"train\.distill: should be a section"),
    ],
)
def test_mistakes_in_the_section_name_the_key(override, message):
    with pytest.raises(RecipeError, match=message):
        learning(override)
