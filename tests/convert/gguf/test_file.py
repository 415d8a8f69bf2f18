"""GGUF files there and back, against the `gguf` package's own reader."""

import math
from dataclasses import replace
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch

from lightlm.convert.folding import as_plain
from lightlm.convert.formats import FORMATS
from lightlm.convert.gguf.file import export_gguf, import_gguf, modelfile_path
from lightlm.convert.gguf.header import read_header
from lightlm.convert.gguf.layouts import LAYOUTS, gguf_layout
from lightlm.convert.gguf.modelfile import modelfile, quoted
from lightlm.convert.gguf.shape import read_shape
from lightlm.data.chat import template
from lightlm.errors import ConvertError
from tests.convert.gguf.models import MODELS
from tests.convert.models import loaded


@pytest.fixture
def write(tmp_path, tokenizer):
    """A function that exports a model with random weights, and returns it without scales, and the file."""

    def write(name, precision="float32", **changes):
        model = as_plain(loaded(replace(MODELS[name], vocab_size=0, **changes), tokenizer))
        export_gguf(model, tmp_path / "model.gguf", precision)
        return model, tmp_path / "model.gguf"

    return write


@pytest.mark.parametrize("name", MODELS)
def test_float32_comes_back_bit_for_bit(name, write):
    """Shape, weights, tokens; blocks that repeat come back as layers of their own, which compute the same."""
    model, path = write(name)
    back = import_gguf(path)
    if model.model.config.layer_sharing == 1:
        assert back.model.config == model.model.config
        ours, theirs = model.model.state_dict(), back.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    tokens = torch.randint(model.model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(back.model(tokens), model.model(tokens))
    assert back.tokenizer.difference(model.tokenizer) == ""
    assert back.tokenizer.end_of_text_id == model.tokenizer.end_of_text_id
    assert FORMATS["gguf"].shape(path) == back.model.config


@pytest.mark.parametrize(
    ("precision", "bits", "error"),
    # The largest error of a weight, as a part of the largest weight of its block of 32: half a step of the grid.
    [
        ("float16", 16, 2**-11),
        ("bfloat16", 16, 2**-8),
        ("q8_0", 8.5, 0.5 / 127 + 2**-10),
        ("q5_0", 5.5, 1 / 16 + 2**-9),
        ("q5_1", 6, 1 / 31 + 2**-9),
        ("q4_0", 4.5, 1 / 8 + 2**-9),
        ("q4_1", 5, 1 / 15 + 2**-9),
    ],
)
def test_precisions(precision, bits, error, write):
    """Matrices of the blocks lose what the type says; vectors lose nothing; tables keep 8 bits."""
    model, path = write("wide", precision)
    back = import_gguf(path).model.state_dict()
    for name, weight in model.model.state_dict().items():
        if weight.ndim < 2:
            assert torch.equal(back[name], weight)
        elif name != "embed_tokens.weight":
            blocks = weight.unflatten(-1, (-1, 32))
            limit = error * blocks.abs().amax(-1, keepdim=True)
            assert ((back[name].unflatten(-1, (-1, 32)) - blocks).abs() <= limit).all(), name
    reader = gguf.GGUFReader(path)
    [matrix] = [tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_v.weight"]
    assert matrix.n_bytes * 8 == bits * math.prod(matrix.shape)
    [table] = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    assert table.n_bytes * 8 / math.prod(table.shape) == max(bits, 8.5)


def test_quantized_rows_that_are_no_whole_blocks_are_float16(write):
    _, path = write("narrow", "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


def test_the_gguf_package_reads_names_shapes_and_settings(write):
    model, path = write("moe")
    config, reader = model.model.config, gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "glm4moe"
    assert fields["glm4moe.attention.layer_norm_rms_epsilon"] == np.float32(config.norm_eps)
    assert fields["glm4moe.expert_gating_func"] == 2
    assert fields["tokenizer.ggml.tokens"][config.vocab_size - 1] == model.tokenizer.name_of(config.vocab_size - 1)
    experts = {tensor.name: tensor for tensor in reader.tensors}["blk.1.ffn_up_exps.weight"]
    assert np.array_equal(experts.data, model.model.blocks[1].mlp.experts.up_proj.detach().numpy())


def test_queries_and_keys_of_llama_are_stored_in_neighboring_pairs(write):
    """Channel i and i + K/2 of a head rotate together here, 2i and 2i + 1 in the file."""
    model, path = write("llama")
    size = model.model.config.head_dim
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}["blk.1.attn_k.weight"]
    ours = model.model.blocks[1].attention.k_proj.weight.detach().numpy()
    for row in range(len(ours)):
        head, channel = divmod(row, size)
        pair, second = channel % (size // 2), channel // (size // 2)
        assert np.array_equal(stored[head * size + 2 * pair + second], ours[row])


def test_every_layout_places_every_field():
    """A field that no layout names must be refused where it is not at its default."""
    for layout in LAYOUTS.values():
        assert not set(layout.keys) & set(layout.fixed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt3", "sliding_window: 5"),
        ("gated", "attention_gate: true"),
        ("relu2", "mlp: relu2"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(name, message, tmp_path, tokenizer):
    from tests.shapes import SHAPES

    config = replace(SHAPES[name], vocab_size=0)
    assert message in gguf_layout(config)[1]
    with pytest.raises(ConvertError, match=message):
        export_gguf(loaded(config, tokenizer), tmp_path / "model.gguf", "float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-5}, "norm_eps: 1e-05 (must be 1e-6, that of the latents' norms)"),
        ({"rope_scaling": "linear", "rope_factor": 2.0}, "rope_scaling: linear (must be none)"),
        *(({"num_layers": depth}, "q_lora_rank: 20 (must be 0 with 26, 27 or 48 layers") for depth in (26, 27, 48)),
        ({"num_layers": 13, "layer_sharing": 2}, "q_lora_rank: 20 (must be 0 with 26, 27 or 48 layers"),
        ({"sliding_window": 5}, "sliding_window: 5"),
    ],
)
def test_what_deepseek2_cannot_hold_is_named(changes, message):
    assert message in gguf_layout(replace(MODELS["deepseek2"], **changes))[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count_kv": 4}, "head_count_kv is 4, must be 1"),
        ({"expert_group_count": 2}, "expert_group_count is 2, must be 1"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers is 1, must be 0"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn', must be 'none'"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is '0.1', which it does not compute"),
        ({"expert_gating_func": 3}, "expert_gating_func must be one of"),
        ({"rope.dimension_count": 3}, "qk_rope_head_dim: must be even"),
        ({"rope.dimension_count": 64}, "qk_nope_head_dim: must be at least 0"),
        ({"attention.kv_lora_rank": 10**6}, "it says 1,000,000, but no tensor has more than"),
        ({"attention.q_lora_rank": 10**6}, "it says 1,000,000, but no tensor has more than"),
        ({"attention.value_length_mla": 10**6}, "it says 4,000,000, but no tensor has more than"),
    ],
)
def test_metadata_of_latents_that_lies(changes, message, write):
    header = read_header(write("deepseek2")[1])
    metadata = header.metadata | {f"deepseek2.{key}": value for key, value in changes.items()}
    with pytest.raises(ConvertError, match=message):
        read_shape(replace(header, metadata=metadata))


def test_a_failed_export_leaves_the_old_file(write, monkeypatch):
    model, path = write("llama")
    before = path.read_bytes()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_gguf(model, path, "q8_0")
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.Modelfile", "model.gguf"]


def test_the_modelfile_names_the_file_and_the_context(write):
    model, path = write("llama")
    lines = modelfile_path(path).read_text().splitlines()
    assert "FROM ./model.gguf" in lines
    assert f"PARAMETER num_ctx {model.model.config.max_seq_len}" in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert 'TEMPLATE "{{ .Prompt }}"' in lines


@pytest.mark.parametrize("stop", ["<|end|>", 'say "stop"', '"', '""', '""" x', "\\n", "a b"])
def test_stop_strings_are_quoted_as_ollama_reads_them(stop):
    """Its parser cuts three quotes at both ends, else one; between them it knows no escapes."""
    written = quoted(stop)
    marks = 3 if written.startswith('"""') else 1
    assert len(written) >= 2 * marks
    assert written[-marks:] == '"' * marks
    assert written[marks:-marks] == stop


def test_the_modelfile_names_ends_that_ollama_cannot_hold(write):
    model, path = write("llama")
    names = {7: "a\nb", 8: "<|end|>"}
    tokenizer = Mock(end_ids=frozenset(names), name_of=names.get, settings={})
    lines = modelfile(replace(model, tokenizer=tokenizer), path).splitlines()
    assert [line for line in lines if "stop" in line] == ['PARAMETER stop "<|end|>"']
    assert "# Ollama drops the characters of the end token 'a\\nb'" in lines


def test_the_modelfile_writes_turns_as_the_chat_template(write):
    model, path = write("llama")
    turns = template.CHATML
    begins = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe SmolLM.<|im_end|>\n{% endif %}"
    form = 'TEMPLATE """{{- range .Messages }}<|im_start|>'
    for source, lines in (
        (turns, [form]),
        (begins + turns, [form, 'SYSTEM "Be SmolLM."']),
        (begins.replace("Smol", "Smol\n") + turns, [form, 'SYSTEM """Be Smol\nLM."""']),
        ("<|im_start|>{{ messages[0].content }}<|im_end|>", []),
        ("[INST]", []),
        ("{{ raise_exception('no') }}", []),
    ):
        chat = replace(model, tokenizer=model.tokenizer.used_as(None, False, {"chat_template": source}, {}))
        export_gguf(chat, path, "float32")
        text = modelfile_path(path).read_text()
        assert ("TEMPLATE" in text, "SYSTEM" in text) == (len(lines) > 0, len(lines) > 1)
        assert all(f"\n{line}" in text for line in lines)


def test_scaled_positions_of_other_programs(write, monkeypatch):
    """They write only the divisors. The rule of Llama 3 is found again; others are refused."""
    rule = {"rope_factor": 32.0, "rope_original_seq_len": 8192, "rope_theta": 500_000.0}
    monkeypatch.setattr("lightlm.convert.gguf.file.write_rotary", lambda config: ({}, {}))
    model, path = write("llama3", **rule)
    assert import_gguf(path).model.config == model.model.config
    assert "rope_freqs.weight" in {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    _, path = write("llama3", **rule | {"rope_high_freq_factor": 3.0})
    with pytest.raises(ConvertError, match=r"rope_freqs\.weight scales rotary frequencies otherwise than Llama 3"):
        import_gguf(path)


def test_only_llama_has_llama3_positions(tokenizer):
    for name, scaling, architecture in (("llama3", "llama3", "llama"), ("qwen3", "linear", "qwen3")):
        assert LAYOUTS[gguf_layout(replace(MODELS[name], rope_scaling=scaling))[0]].architecture == architecture
    assert (
        "rope_scaling: llama3 (must be none or linear)"
        in gguf_layout(replace(MODELS["qwen3"], rope_scaling="llama3"))[1]
    )
