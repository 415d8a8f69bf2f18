"""Programs of torch.export, held to the model's own forward pass."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightlm.convert.folding import as_plain
from lightlm.convert.formats import FORMATS, format_of
from lightlm.convert.torch_export import exported
from lightlm.errors import ConvertError, DiskFullError
from tests.convert.models import loaded
from tests.shapes import SHAPES, build

PT2 = FORMATS["pt2"]


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_every_architecture_with_any_batch_and_length(name):
    """Also unfolded ones, one token, and lengths beyond a window."""
    model = build(name)
    program = exported(model).module()
    for shape in ((1, 1), (3, 2), (2, 31), (1, model.config.max_seq_len)):
        tokens = torch.randint(97, shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(program(tokens), model(tokens), atol=2e-6, rtol=0)
    with pytest.raises(AssertionError, match="48"):
        program(torch.zeros(1, 49, dtype=torch.int64))


def test_the_file(tokenizer, tmp_path):
    """It loads without LightLM, verifies, and holds the tokenizer; it is known as ours, and not read.

    test_matrix.py has the other precisions.
    """
    model = as_plain(loaded(replace(SHAPES["scaled"], vocab_size=0), tokenizer))
    path, precision = tmp_path / "new" / "model.pt2", torch.bfloat16
    facts = PT2.write(model, path, precision)
    assert facts["parameters"] == model.model.num_parameters()["total"]
    assert PT2.verify(model, path, precision) < 1e-2
    files = {"tokenizer.json": "", "config.json": ""}
    assert torch.export.load(path, extra_files=files).module()(torch.zeros(1, 3, dtype=torch.int64)).dtype == precision
    assert json.loads(files["tokenizer.json"])["model"]["type"] == "BPE"
    assert json.loads(files["config.json"])["hidden_size"] == 32
    assert format_of(path).name == "pt2"
    assert PT2.is_own(path)
    assert [each.name for each in path.parent.iterdir()] == ["model.pt2"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    """torch's own writer would end the process."""

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = loaded(replace(SHAPES["qwen3"], vocab_size=0), tokenizer)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError):
        PT2.write(model, tmp_path / "model.pt2", torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_wrong_program_is_found(tokenizer, tmp_path, monkeypatch):
    model = loaded(replace(SHAPES["qwen3"], vocab_size=0), tokenizer)
    other = loaded(replace(SHAPES["qwen3"], vocab_size=0, rope_theta=5.0), tokenizer)
    PT2.write(other, tmp_path / "model.pt2", torch.float32)
    with pytest.raises(ConvertError, match=r"does not compute what .* more than rounding"):
        PT2.verify(model, tmp_path / "model.pt2", torch.float32)
