"""What a plan says of a teacher, against the teacher itself."""

import shutil
from pathlib import Path

import pytest
import torch

from lightlm.convert.load import find_start, load_pretrained
from lightlm.data.folder import DataFolder
from lightlm.recipe import load_recipe
from lightlm.train.planning.plan import make_plan
from lightlm.train.planning.teacher import teacher_bytes, teacher_of
from lightlm.train.step.teacher import Teacher
from lightlm.train.teaching.store import store_teacher
from tests.train.watch import start

LEARN = ("train.distill.teacher=planned", "train.distill.dtype=float32")


@pytest.fixture(scope="module")
def planned(workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        start("tiny.yaml", "model.hidden_size=48", "train.tokens=256", "eval.prompts=[]", name="planned")
    return workspace


@pytest.fixture(autouse=True)
def _in_workspace(planned, monkeypatch):
    monkeypatch.chdir(planned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teachers_memory_is_that_of_its_tensors(dtype):
    recipe = load_recipe(
        "tiny.yaml", [*LEARN, f"train.distill.dtype={dtype}", "model.vocab_size=320"], find_start=find_start
    )
    teacher = Teacher(load_pretrained("planned").model, 320, getattr(torch, dtype))
    tensors = {p.data_ptr(): p.nbytes for p in teacher.model.parameters()}
    head = teacher._head_WE
    tensors[head.data_ptr()] = max(tensors.get(head.data_ptr(), 0), 320 * 48 * head.itemsize)  # without padding
    shape = teacher_of(recipe)
    parts = teacher_bytes(recipe, shape, torch.device("cpu"), torch.float32, 64)
    assert parts["teacher"] == sum(tensors.values())
    assert parts["teacher_pass"] > 64 * 320 * head.itemsize


def test_a_plan_counts_operations_and_disk_and_times_the_teacher():
    recipe = load_recipe("tiny.yaml", LEARN, find_start=find_start)
    plan = make_plan(recipe)
    model, teacher = load_pretrained("planned").model, plan["run"]["teacher"]
    assert teacher["parameters"] == model.num_parameters()["total"]
    assert teacher["flops_per_token"] == model.flops_per_token(32) // 3
    assert teacher["flops"] == 5120 * teacher["flops_per_token"]
    assert teacher["disk"] == 258 * len(DataFolder.open("data/tiny").split("train"))
    assert plan["machine"]["measured"] is not None
    assert plan["machine"]["memory"]["teacher"] > 0
    without = make_plan(load_recipe("tiny.yaml"), probe=False)
    assert without["run"]["teacher"] is None
    assert "teacher" not in without["machine"]["memory"]
    for alone, taught in zip(without["gpus"], plan["gpus"], strict=True):
        assert taught["memory"] > alone["memory"]


def test_a_stored_teacher_takes_its_records():
    """Also where the data is not prepared, and a step is measured."""
    stored = "train.distill.teacher=stored"
    plan = make_plan(load_recipe("tiny.yaml", [stored, "data.dataset=nowhere", "model.vocab_size=320"]))
    assert plan["machine"]["measured"] is not None
    assert plan["run"]["teacher"]["record_bytes"] == 258
    shutil.copytree("data/tiny", "data/planned")
    store_teacher(Path("data/planned"), "planned", top_k=10)
    plan = make_plan(load_recipe("tiny.yaml", [stored, "data.dataset=planned"]), probe=False)
    assert plan["run"]["teacher"]["flops"] is None
    assert plan["run"]["teacher"]["disk"] == 42 * len(DataFolder.open("data/tiny").split("train"))


def test_a_plan_notes_a_named_precision_that_is_slow_here(monkeypatch):
    monkeypatch.setattr("lightlm.cpu.gain", lambda dtype, width: 0.125)
    slow, automatic = (
        make_plan(load_recipe("demo", ["train.device=cpu", f"train.dtype={name}"]), probe=False)["notes"]
        for name in ("bfloat16", "auto")
    )
    assert [note for note in slow if note not in automatic] == [
        "train.dtype=bfloat16: products take 8.0 times as long as in float32 on this CPU; float32 or auto is faster"
    ]
