"""The precision of decoding follows a measurement, which is made once."""

import pytest
import torch

from lightlm.generate.step import precision
from lightlm.generate.step.precision import bf16_gain, decoding_dtype
from tests.shapes import SHAPES, build


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Gains to be found, one for each measurement, and the cache in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "_SMALL", 0)
    gains = []
    monkeypatch.setattr(precision, "bf16_gain", lambda _: gains.pop(0))
    return gains


def test_the_answer_is_measured_once_for_each_shape(measured):
    measured += [2.0, 0.5]
    assert decoding_dtype(build("llama")) == torch.bfloat16
    assert decoding_dtype(build("gpt2")) == torch.float32
    assert decoding_dtype(build("llama", seed=1)) == torch.bfloat16
    assert not measured


def test_a_home_folder_serves_processors_of_one_name(measured, monkeypatch):
    measured += [2.0, 0.5]
    for features, expected in (("avx2 avx512_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr("lightlm.generate.step.measured.cpu_features", lambda features=features: features)
        assert [decoding_dtype(build("llama")) for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"a": 1}'])
def test_a_damaged_file_is_replaced(measured, tmp_path, damage):
    (tmp_path / "lightlm").mkdir()
    (tmp_path / "lightlm" / "decoding.json").write_text(damage)
    measured += [2.0]
    assert [decoding_dtype(build("llama")) for _ in range(2)] == [torch.bfloat16] * 2


def test_without_a_folder_for_the_answer_it_is_measured_again(measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measured += [2.0, 1.05]
    assert [decoding_dtype(build("llama")) for _ in range(2)] == [torch.bfloat16, torch.float32]


def test_a_user_without_a_home_folder_decodes(measured, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", no_home)
    measured += [2.0]
    assert decoding_dtype(build("llama")) == torch.bfloat16


def test_a_small_model_takes_float32_without_a_measurement():
    assert decoding_dtype(build("llama")) == torch.float32


@pytest.mark.parametrize("name", SHAPES)
def test_the_gain_of_any_architecture_is_a_number(name):
    assert bf16_gain(build(name)) > 0
