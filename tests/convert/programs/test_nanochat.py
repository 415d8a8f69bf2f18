"""Checkpoints of nanochat are refused with what LightLM's model lacks for each."""

import json

import pytest
import torch

from lightlm.convert.formats import FORMATS
from lightlm.convert.load import load_pretrained
from lightlm.errors import ConvertError
from tests.cli.runner import Runner

OCTOBER_2025 = {"transformer.wte.weight": (64, 16), "transformer.h.0.attn.c_q.weight": (16, 16)}
JULY_2026 = OCTOBER_2025 | {
    "resid_lambdas": (2,),
    "x0_lambdas": (2,),
    "smear_gate.weight": (1, 24),
    "smear_lambda": (1,),
    "backout_lambda": (1,),
    "value_embeds.1.weight": (64, 16),
}


def write_checkpoint(folder, shapes, step=100, **settings):
    folder.mkdir(exist_ok=True)
    torch.save({f"_orig_mod.{name}": torch.ones(size) for name, size in shapes.items()}, folder / f"model_{step:06}.pt")
    config = {"sequence_len": 128, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 16}
    (folder / f"meta_{step:06}.json").write_text(json.dumps({"step": step, "model_config": config | settings}))


def test_the_first_version_lacks_a_cap_on_logits(tmp_path):
    write_checkpoint(tmp_path, OCTOBER_2025)
    with pytest.raises(ConvertError, match=r"LightLM lacks: a cap on the logits by tanh\. To train on"):
        load_pretrained(tmp_path / "model_000100.pt")


def test_later_versions_lack_more(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "d12", OCTOBER_2025, 100)
    write_checkpoint(tmp_path / "d12", JULY_2026, 2000, window_pattern="SSSL")
    assert [known.name for known in FORMATS.values() if known.detect(tmp_path / "d12")] == ["nanochat"]
    parts = ("value_embeds", "x0_lambdas", "smear_gate", "backout_lambda", "windows in the pattern SSSL")
    for command in (("convert",), ("generate", "Hello", "--checkpoint"), ("convert", "--to", "gguf")):
        outcome = Runner(monkeypatch, capsys)(*command, str(tmp_path / "d12"))
        assert outcome.code == 1
        assert all(part in " ".join(outcome.stderr.split()) for part in ("model_002000.pt", *parts)), outcome.stderr
        assert "Traceback" not in outcome.stderr
