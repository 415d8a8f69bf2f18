"""What a sweep asks of the machine, in a process of its own."""

import os

import pytest
import torch

from lightlm import cpu
from lightlm.data.folder import DataFolder
from lightlm.errors import LightLMError, UsageError
from lightlm.recipe import load_recipe
from lightlm.sweep.machine import Machine, fitting_tokens, look_at_machine
from tests.corpus import make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("machine"), 60)


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def test_the_precision_of_auto_is_found_and_a_given_one_kept():
    assert look_at_machine(load_recipe("tiny.yaml")) == Machine("cpu", (), "float32")


def test_a_named_precision_is_kept_and_what_is_slow_here_is_said():
    found = look_at_machine(load_recipe("tiny.yaml", ["train.dtype=bfloat16"]))
    assert (found.device, found.dtype) == ("cpu", "bfloat16")
    if (gain := cpu.gain(torch.bfloat16, load_recipe("tiny.yaml").model.hidden_size)) < 0.4:
        assert "bfloat16: products take" in found.slow
    elif gain > 1:
        assert not found.slow


def test_a_missing_device_is_one_message():
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(UsageError, match="device 'cuda' is not available"):
        look_at_machine(load_recipe("tiny.yaml", ["train.device=cuda"]))


def test_a_failure_is_told_in_any_encoding():
    recipe = load_recipe("tiny.yaml", ["data.dataset=Jürgen"])
    with pytest.raises(LightLMError, match="Jürgen"):
        fitting_tokens(recipe, 10, {**os.environ, "PYTHONIOENCODING": "cp1252"})


def test_the_tokens_of_a_limit_of_time_are_whole_batches_and_may_exceed_the_recipes():
    recipe = load_recipe("tiny.yaml", ["train.tokens=256"])
    tokens = fitting_tokens(recipe, 10, os.environ)
    assert tokens % 256 == 0
    assert tokens > 2560  # ten batches take less than ten minutes anywhere
    assert DataFolder.open("data/tiny").split("train")  # and the data is read, not made
