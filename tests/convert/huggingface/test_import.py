"""Folders that transformers wrote, read by LightLM, and folders that it must refuse."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lightlm.checkpoint import load_model, save_model
from lightlm.convert.huggingface.folder import import_huggingface
from lightlm.errors import ConvertError, LightLMError
from tests.convert.models import difference, edit, roughen, write

transformers = pytest.importorskip("transformers")

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 20.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "gpt2": (transformers.GPT2Config, GPT2),
    "gpt2 untied, own width": (transformers.GPT2Config, {**GPT2, "n_inner": 40, "tie_word_embeddings": False}),
    "llama": (transformers.LlamaConfig, {**LLAMA, "rms_norm_eps": 1e-3}),
    "llama grouped, tied": (transformers.LlamaConfig, {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama biases": (transformers.LlamaConfig, {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama wide heads, far base": (
        transformers.LlamaConfig,
        {**LLAMA, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "llama biases of attention": (transformers.LlamaConfig, {**LLAMA, "attention_bias": True}),
    "llama biases of the network": (transformers.LlamaConfig, {**LLAMA, "mlp_bias": True}),
    "llama linear positions": (
        transformers.LlamaConfig,
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "llama3 positions": (transformers.LlamaConfig, {**LLAMA, "head_dim": 16, "rope_parameters": LLAMA3}),
    "qwen2": (transformers.Qwen2Config, {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "arcee": (transformers.ArceeConfig, {**LLAMA, "num_key_value_heads": 2, "mlp_bias": True}),
    "starcoder2": (transformers.Starcoder2Config, {**LLAMA, "num_key_value_heads": 2}),
    "mistral": (transformers.MistralConfig, {**LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen3": (transformers.Qwen3Config, {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3.5": (
        transformers.Qwen3_5TextConfig,
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 1.0},
        },
    ),
}


def build(family, vocab_size, **changes):
    config_class, values = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**{**values, **changes}, vocab_size=vocab_size, eos_token_id=0, bos_token_id=0)
    return roughen(transformers.AutoModelForCausalLM.from_config(config))


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A Llama folder as transformers writes it, with a tokenizer."""
    return write(build("llama grouped, tied", tokenizer.vocab_size), tokenizer, tmp_path / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, tokenizer, tmp_path):
    theirs = build(family, tokenizer.vocab_size + 5)
    loaded = import_huggingface(write(theirs, tokenizer, tmp_path / "hf"))
    assert difference(loaded.model, theirs) < 1e-4
    assert not loaded.model.training
    assert loaded.tokenizer.encode("The cat") == tokenizer.encode("The cat")
    save_model(tmp_path / "ours", loaded.model, loaded.tokenizer)
    assert difference(load_model(tmp_path / "ours").model, theirs) < 1e-4


def test_gpt2_at_full_width(tokenizer, tmp_path):
    """`GPT2Config()` is GPT-2 124M: its 50,257 rows unpadded, its losses per token. One layer of the twelve."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    loaded = import_huggingface(write(theirs, tokenizer, tmp_path / "gpt2"))
    assert loaded.model.num_parameters()["total"] == 124_439_808 - 11 * 7_087_872
    tokens = torch.randint(50257, (1, 33))
    with torch.no_grad():
        losses = [
            F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
            for logits in (loaded.model(tokens), theirs(tokens).logits)
        ]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype, tokenizer, tmp_path):
    theirs = build("gpt2", tokenizer.vocab_size).to(dtype)
    loaded = import_huggingface(write(theirs, tokenizer, tmp_path / "hf"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert difference(loaded.model, theirs.float()) < 1e-4


def test_shards(tokenizer, tmp_path):
    theirs = build("llama", tokenizer.vocab_size)
    path = write(theirs, tokenizer, tmp_path / "hf", max_shard_size="30KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert not (path / "model.safetensors").exists()
    assert difference(import_huggingface(path).model, theirs) < 1e-4
    shards[1].unlink()
    with pytest.raises(ConvertError, match=f"{shards[1].name} is missing"):
        import_huggingface(path)


def test_pytorch_file_with_old_names(tokenizer, tmp_path):
    """The first GPT-2 files on the Hub lack the `transformer.` prefix and hold the causal masks."""
    theirs = build("gpt2", tokenizer.vocab_size)
    path = write(theirs, tokenizer, tmp_path / "hf")
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")
    assert difference(import_huggingface(path).model, theirs) < 1e-4


def test_config_written_by_transformers_4(folder, tokenizer):
    theirs = build("llama grouped, tied", tokenizer.vocab_size)
    theirs.config.rope_parameters["rope_theta"] = 500.0
    edit(folder / "config.json", rope_parameters="DELETED", rope_theta=500.0, rope_scaling=None, torch_dtype="float32")
    assert import_huggingface(folder).model.config.rope_theta == 500.0
    edit(folder / "config.json", rope_theta="DELETED", num_key_value_heads=2, head_dim="DELETED", mlp_bias="DELETED")
    config = import_huggingface(folder).model.config
    assert (config.rope_theta, config.head_dim) == (10_000.0, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.5}},  # beside rope_parameters, which says default
        {"rope_parameters": "DELETED", "rope_theta": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_parameters": "DELETED", "rope_theta": 300.0, "rope_scaling": {**LLAMA3, "rope_theta": 40.0}},
        {"rope_scaling": {key: value for key, value in LLAMA3.items() if not key.startswith("o")}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 12},
        {"rope_scaling": None, "rope_parameters": LLAMA3},
    ],
)
def test_positions_are_scaled_as_transformers_does(changes, folder):
    """Wherever a version of transformers writes it, also past the positions of the first training."""
    edit(folder / "config.json", **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = import_huggingface(folder).model
    assert ours.config.rope_scaling != "none"
    assert difference(ours, theirs) < 1e-5
    edit(folder / "config.json", rope_scaling=None, rope_parameters={"rope_type": "default"})
    assert difference(import_huggingface(folder).model, theirs) > 1e-3  # it matters


def test_extra_copy_of_a_tied_head(folder):
    state = load_file(folder / "model.safetensors")
    tokens = torch.arange(8)[None]
    expected = import_huggingface(folder).model(tokens)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert torch.equal(import_huggingface(folder).model(tokens), expected)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(ConvertError, match=r"tie_word_embeddings: true, but lm_head\.weight differs"):
        import_huggingface(folder)


def test_a_folder_with_the_two_files_of_gpt2(folder, tokenizer):
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    built = import_huggingface(folder).tokenizer
    for text in ("The cat sat on 12 mats.", "naïve 深海\n"):
        assert built.encode(text) == tokenizer.encode(text)
    assert built.end_of_text_id == tokenizer.end_of_text_id


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"config": 3}, 3),
        ({"config": [4, 3]}, 4),
        ({"config": None, "generation": [5]}, 5),
        ({"config": 99_999, "tokenizer": "<|endoftext|>"}, 0),
        ({"config": None, "tokenizer": {"content": "!", "special": True}}, 1),
        ({"config": None}, 0),
    ],
)
def test_end_of_text(places, expected, folder, tokenizer, tmp_path):
    assert tokenizer.encode("!") == [1]
    edit(folder / "config.json", eos_token_id=places["config"])
    edit(folder / "generation_config.json", eos_token_id=places.get("generation"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": places.get("tokenizer")}))
    loaded = import_huggingface(folder)
    assert loaded.tokenizer.end_of_text_id == expected
    save_model(tmp_path / "ours", loaded.model, loaded.tokenizer)
    assert load_model(tmp_path / "ours").tokenizer.end_of_text_id == expected


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        (
            "llama",
            {"model_type": "gpt_neox"},
            [
                "'gpt_neox'",
                "arcee, deepseek_v3, glm4_moe, gpt2, llama, mistral, mixtral, qwen2, qwen3, ",
                "qwen3_5_text, qwen3_moe, starcoder2",
            ],
        ),
        ("llama", {"model_type": "olmo2"}, ["'olmo2', which LightLM does not have: it normalizes what attention"]),
        ("llama", {"model_type": ["llama"]}, ["model_type is"]),
        ("starcoder2", {"sliding_window": 16}, ["sliding_window is 16"]),
        ("starcoder2", {"use_bias": False}, ["use_bias is False"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
        ("llama", {"is_causal": False}, ["is_causal is False, must be true"]),
        ("llama", {"attention_bias": "yes"}, ["attention_bias is 'yes', must be true or false"]),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["rope_parameters has no low_freq_fac"]),
        ("llama", {"rope_scaling": {"type": "linear"}}, ["rope_scaling has no factor, which rope_type 'linear' needs"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, ["rope_factor: must be a number above 0"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, ["rope_factor is '2', not a number"]),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling", "'dynamic'"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope_parameters", "'yarn'"]),
        ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["rope_scaling", "'longrope'"]),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["same settings for every layer"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ("llama", {"hidden_size": "DELETED"}, ["hidden_size is missing"]),
        ("llama", {"num_attention_heads": 3, "head_dim": None}, ["num_heads: 3 does not divide"]),
        ("llama", {"hidden_size": "wide"}, ["does not describe a model"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "'gptq'"]),
        ("mistral", {"sliding_window": 16}, ["sliding_window is 16"]),
        ("qwen3", {"use_sliding_window": True}, ["use_sliding_window is True"]),
        ("qwen3", {"attention_bias": True, "hidden_act": "relu"}, ["attention_bias is True", "hidden_act is 'relu'"]),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types has sliding_attention"]),
        ("qwen3.5", {"layer_types": "DELETED"}, ["layer_types has linear_attention"]),
        ("qwen3.5", {"layer_types": ["linear_attention", "full_attention"]}, ["layer_types has linear_attention"]),
        ("qwen3.5", {"attn_output_gate": False}, ["attn_output_gate is False"]),
        ("qwen3.5", {"rope_parameters": {"rope_type": "default"}}, ["partial_rotary_factor is 0.25"]),
        ("qwen3.5", {"model_type": "qwen3_5", "vision_config": {}}, ["'qwen3_5'", "qwen3_5_text"]),
        ("gpt2", {"activation_function": "relu"}, ["activation_function is 'relu'", "gelu_new"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx is True"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights is False"]),
    ],
)
def test_refused_configurations(family, changes, named, tokenizer, tmp_path):
    path = write(build(family, tokenizer.vocab_size), tokenizer, tmp_path / "hf")
    edit(path / "config.json", **changes)
    with pytest.raises(ConvertError) as error:
        import_huggingface(path)
    assert [name for name in [*named, "config.json"] if name not in str(error.value)] == []


def test_tokenizer_of_another_model(folder, tokenizer):
    edit(folder / "config.json", vocab_size=tokenizer.vocab_size - 1)
    with pytest.raises(ConvertError, match=rf"tokenizer\.json has {tokenizer.vocab_size} tokens"):
        import_huggingface(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: cut(folder / "config.json"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (lambda folder: cut(folder / "tokenizer.json"), r"tokenizer\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no weights: none of model\.safetensors, "),
        (lambda folder: cut(folder / "model.safetensors"), r"model\.safetensors cannot be read"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=3), r"layers\.2\.\S+ is missing"),
        (
            lambda folder: edit(folder / "config.json", num_hidden_layers=1),
            r"layers\.1\.\S+ belongs to no part of Llama",
        ),
        (lambda folder: edit(folder / "config.json", tie_word_embeddings=False), r"lm_head\.weight is missing"),
        (lambda folder: edit(folder / "config.json", intermediate_size=40), r"gate_proj\.weight has shape \(48, 32\)"),
    ],
)
def test_damaged_folder(damage, message, folder):
    damage(folder)
    with pytest.raises(LightLMError, match=message) as error:
        import_huggingface(folder)
    assert folder.name in str(error.value)


def test_damaged_pytorch_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a zip file")
    with pytest.raises(ConvertError, match=r"pytorch_model\.bin cannot be read"):
        import_huggingface(folder)


def test_shapes_of_a_fused_weight(tokenizer, tmp_path):
    path = write(build("gpt2", tokenizer.vocab_size), tokenizer, tmp_path / "hf")
    state = load_file(path / "model.safetensors")
    state["transformer.h.0.attn.c_attn.weight"] = torch.zeros(32, 64)
    save_file(state, path / "model.safetensors")
    with pytest.raises(ConvertError, match=r"h\.0\.attn\.c_attn\.weight has 64 rows, not 32 \+ 32 \+ 32"):
        import_huggingface(path)


@pytest.mark.parametrize("rows", [64, 70])
def test_queries_without_their_gate(rows, tokenizer, tmp_path):
    path = write(build("qwen3.5", tokenizer.vocab_size), tokenizer, tmp_path / "hf")
    state = load_file(path / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(rows, 32)
    save_file(state, path / "model.safetensors")
    with pytest.raises(LightLMError, match=rf"q_proj\.weight has {rows} rows, not 64 \+ 64"):
        import_huggingface(path)
