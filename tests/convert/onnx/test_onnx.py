"""ONNX models in onnxruntime, held to the plain forward pass."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from lightlm.checkpoint import clean_state
from lightlm.convert.folding import as_plain
from lightlm.convert.formats import FORMATS, format_of
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig
from tests.convert.models import loaded
from tests.shapes import SHAPES

onnx = pytest.importorskip("onnx", reason="onnx is not installed; it is in the extra [onnx]")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is in the extra [onnx]")

from lightlm.convert.onnx import folder as onnx_folder  # noqa: E402
from lightlm.convert.onnx.builder import quantize  # noqa: E402
from lightlm.convert.onnx.folder import export_onnx  # noqa: E402
from lightlm.convert.onnx.graph import build_graph  # noqa: E402
from lightlm.convert.onnx.verify import Session, verify  # noqa: E402


def export(name, tokenizer, out, dtype=torch.float32, quantize=""):
    model = as_plain(loaded(replace(SHAPES[name], vocab_size=0), tokenizer))
    _, path = export_onnx(model, out, dtype, quantize)
    return model, path


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name].attention == "gqa"])
@torch.no_grad()
def test_prompts_and_single_tokens(name, tokenizer, tmp_path):
    """One graph computes both, for two rows at once; also past the window of banded layers."""
    model, path = export(name, tokenizer, tmp_path / "onnx")
    tokens = torch.randint(tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = model.model(tokens)
    torch.testing.assert_close(Session(path)(tokens), ours, atol=2e-5, rtol=0)
    session = Session(path)
    chunks = [session(chunk) for chunk in tokens.split([30, 7, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, 1), ours, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "shared", "moe"])
@torch.no_grad()
def test_rows_padded_on_the_left(name, tokenizer, tmp_path):
    """As generate of transformers pads a batch: each row is what it is without the other."""
    model, path = export(name, tokenizer, tmp_path / "onnx")
    tokens = torch.randint(tokenizer.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[0, :5] = 0
    session = Session(path)
    prompt = session(tokens[:, :-1], mask[:, :11])
    step = session(tokens[:, -1:], mask[:, :12])
    theirs = torch.cat([prompt, step], 1)
    torch.testing.assert_close(theirs[:1, 5:], model.model(tokens[:1, 5:]), atol=2e-5, rtol=0)
    torch.testing.assert_close(theirs[1:], model.model(tokens[1:]), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 0.55), ("bfloat16", 0.55)])
@torch.no_grad()
def test_weights_in_16_bits(dtype, size, tokenizer, tmp_path):
    """The file is half as large, and computes what our model computes with the rounded weights."""
    _, full = export("llama", tokenizer, tmp_path / "full")
    model, path = export("llama", tokenizer, tmp_path / "half", getattr(torch, dtype))
    assert path.stat().st_size < size * full.stat().st_size
    rounded = copy.deepcopy(model.model).to(getattr(torch, dtype)).float()
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(Session(path)(tokens), rounded(tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "moe"])
@torch.no_grad()
def test_weights_in_8_bits(name, tokenizer, tmp_path):
    """Next tokens' distributions stay close; a tied table is stored once."""
    full = export(name, tokenizer, tmp_path / "full")[1]
    model, path = export(name, tokenizer, tmp_path / "eight", quantize="int8")
    assert path.name == "model_quantized.onnx"
    assert path.stat().st_size < 0.5 * full.stat().st_size
    assert 0 < verify(model, tmp_path / "eight") < 1


def test_8_bits_by_hand():
    """The largest of 32 columns becomes 127, behind an offset of 128; the last block is filled up."""
    weight = torch.linspace(-3.0, 2.0, 40).repeat(2, 1)
    blocks, scales = quantize(weight)
    assert blocks.shape == (2, 2, 32)
    assert blocks[0, 0, 0] == 1
    assert scales[0, 0] == pytest.approx(3 / 127)
    assert blocks[0, 1, 8:].tolist() == [128] * 24
    back = ((blocks.float() - 128) * scales[..., None]).flatten(1)[:, :40]
    assert (back - weight).abs().max() <= scales.max() / 2 + 1e-7
    assert quantize(torch.zeros(1, 3))[0].unique().tolist() == [128]


def test_names_and_sizes_of_inputs_and_outputs(tokenizer, tmp_path):
    """Those of optimum, transformers.js and onnxruntime-genai."""
    session = Session(export("llama", tokenizer, tmp_path / "onnx")[1]).session
    inputs = {each.name: (each.type, each.shape) for each in session.get_inputs()}
    outputs = {each.name: each.shape for each in session.get_outputs()}
    assert list(inputs)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert inputs["input_ids"] == ("tensor(int64)", ["batch_size", "sequence_length"])
    assert inputs["past_key_values.1.value"] == ("tensor(float)", ["batch_size", 2, "past_sequence_length", 8])
    assert list(outputs)[:3] == ["logits", "present.0.key", "present.0.value"]
    assert outputs["logits"] == ["batch_size", "sequence_length", tokenizer.vocab_size]
    assert outputs["present.1.key"] == ["batch_size", 2, "total_sequence_length", 8]


def test_the_graph_is_valid_onnx(tokenizer):
    for name in ("gpt2", "qwen3", "moe"):
        model = as_plain(loaded(replace(SHAPES[name], vocab_size=0), tokenizer))
        graph = build_graph(model.model.config, clean_state(model.model.state_dict()), torch.float16)
        onnx.checker.check_model(graph, full_check=True)


def test_the_folder_is_whole(tokenizer, tmp_path):
    """Configuration and tokenizer load in transformers; the folder is no Hugging Face model, and is known as ours."""
    transformers = pytest.importorskip("transformers")
    _, path = export("shared", tokenizer, tmp_path / "onnx")
    out = tmp_path / "onnx"
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert transformers.AutoTokenizer.from_pretrained(out)("The cat")["input_ids"] == tokenizer.encode("The cat")
    assert config.eos_token_id == tokenizer.end_of_text_id
    assert [known.name for known in FORMATS.values() if known.detect(out)] == ["onnx"]
    assert format_of(path).name == "onnx"
    assert FORMATS["onnx"].is_own(out)
    path.write_bytes(path.read_bytes() + b"\0")
    assert not FORMATS["onnx"].is_own(out)


def test_weights_above_the_limit_of_a_file_are_beside_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_folder, "_LARGEST", 10_000)
    model, path = export("llama", tokenizer, tmp_path / "onnx")
    assert (path.parent / "model.onnx_data").stat().st_size > path.stat().st_size
    assert verify(model, tmp_path / "onnx") < 2e-5


def test_a_wrong_graph_is_found(tokenizer, tmp_path):
    """One with other weights, and one that computes something else with them."""
    model, _ = export("qwen3", tokenizer, tmp_path / "onnx")
    with pytest.raises(ConvertError, match=r"embed_tokens.weight is not the model's"):
        verify(loaded(replace(SHAPES["qwen3"], vocab_size=0, init_std=0.5), tokenizer), tmp_path / "onnx")
    other = replace(model.model.config, rope_theta=5.0)
    graph = build_graph(other, clean_state(model.model.state_dict()), torch.float32)
    onnx.save(graph, tmp_path / "onnx" / "onnx" / "model.onnx")
    with pytest.raises(ConvertError, match=r"does not compute what .* more than rounding"):
        verify(model, tmp_path / "onnx")


@dataclass(frozen=True, kw_only=True)
class _Softer(ModelConfig):
    softcap: float = 0.0


def test_a_field_that_the_graph_does_not_compute_is_refused():
    shape = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "max_seq_len": 8}
    assert FORMATS["onnx"].refusal(_Softer(**shape)) == ""
    assert "does not compute softcap: 30.0" in FORMATS["onnx"].refusal(_Softer(**shape, softcap=30.0))
    assert "does not compute attention: mla" in FORMATS["onnx"].refusal(SHAPES["mla"])
    assert "does not compute mlp: new" in FORMATS["onnx"].refusal(ModelConfig(**shape, mlp="new"))
