"""A new optimizer through the registry, from its recipe to a resumed run."""

import math
from typing import Literal

import pytest
import torch

from lightlm.errors import RecipeError
from lightlm.optim.registry import OPTIMIZERS
from lightlm.optim.section import OptimizerSection
from lightlm.recipe import load_recipe, load_run_recipe
from lightlm.train.observe.metrics import read_metrics
from lightlm.train.planning.plan import make_plan
from tests.corpus import make_workspace
from tests.train.watch import Recorder, comparable, resume, start


class SGDSection(OptimizerSection):
    name: Literal["sgd"] = "sgd"
    damping: float = 0.9

    def build(self, groups, dtype):
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.damping)

    def state_bytes(self, group, shape):
        return 4 * math.prod(shape)


@pytest.fixture(autouse=True)
def _registered(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sgd", SGDSection)
    monkeypatch.chdir(make_workspace(tmp_path, 100))


def test_a_run_trains_resumes_and_keeps_its_settings():
    changes = ["optimizer={name: sgd, lr: 0.5, damping: 0.8}", "train.tokens=1280", "eval.prompts=[]"]
    whole, watch = start("tiny.yaml", *changes, name="whole")
    assert watch.metrics[-1]["loss"] < watch.metrics[0]["loss"]
    start("tiny.yaml", *changes, name="parts", watch=Recorder(terminate_at=2))
    after, _ = resume("parts")
    assert comparable(read_metrics(after.run)) == comparable(read_metrics(whole.run))
    assert load_run_recipe(whole.run).optimizer == SGDSection(lr=0.5, damping=0.8)


def test_a_plan_counts_its_state():
    plan = make_plan(load_recipe("tiny.yaml", ["optimizer.name=sgd"]), probe=False)
    assert plan["machine"]["memory"]["optimizer"] == 4 * plan["model"]["parameters"]


def test_mistakes_name_it():
    with pytest.raises(RecipeError, match=r"optimizer.damping: has no effect with optimizer.name=adamw; leave it out"):
        load_recipe("tiny.yaml", ["optimizer.damping=0.5"])
    with pytest.raises(
        RecipeError, match=r"optimizer.name: should be 'adamw', 'muon', 'normuon' or 'sgd', not 'sdg'; did you"
    ):
        load_recipe("tiny.yaml", ["optimizer.name=sdg"])
