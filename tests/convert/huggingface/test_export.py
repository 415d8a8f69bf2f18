"""transformers loads every export without custom code and gets the same logits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lightlm.checkpoint import LoadedModel
from lightlm.convert.folding import as_plain
from lightlm.convert.formats import FORMATS
from lightlm.convert.huggingface.folder import export_huggingface, import_huggingface
from lightlm.convert.huggingface.layouts import export_target
from lightlm.convert.huggingface.verify import check_tokenizer, largest_difference
from lightlm.convert.record import is_untouched_export
from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig
from tests.convert import models
from tests.convert.models import loaded
from tests.shapes import SHAPES
from tests.trained import train

transformers = pytest.importorskip("transformers")

SAMPLES = ["", "The cat", " leading space", "two  spaces\n\n\ttab", "naïve café 日本語 🙂", "don't 3.14 ,.", "x" * 200]


def difference(model, folder, **options):
    return models.difference(model, transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval())


SIZED = {name: replace(config, vocab_size=0) for name, config in SHAPES.items()}
EXPORTED = {
    "gpt2": SIZED["gpt2"],
    "gpt2 untied, own width": replace(SIZED["gpt2"], tie_embeddings=False, intermediate_size=40),
    "gpt2 repeated blocks": replace(SIZED["gpt2"], layer_sharing=2),
    "llama grouped": SIZED["llama"],
    "llama untied, biases, wide heads": replace(SIZED["llama"], tie_embeddings=False, bias=True, head_dim=10),
    "llama repeated blocks": replace(SIZED["shared"], sliding_window=0),
    "llama padded vocabulary": replace(SIZED["llama"], vocab_size=384),
    "llama biases of attention, llama3 positions": SIZED["llama3"],
    "llama biases of the network, linear positions": replace(
        SIZED["llama"], bias=True, bias_in="mlp", rope_scaling="linear", rope_factor=4
    ),
    "arcee": replace(SIZED["llama"], mlp="relu2"),
    "arcee biases": SIZED["relu2"],
    "starcoder2": replace(SIZED["gpt2"], position="rope", num_kv_heads=2, tie_embeddings=False),
    "qwen2, linear positions": SIZED["qwen2"],
    "gated, llama3 positions": replace(SIZED["gated"], rope_scaling="llama3", rope_factor=2.0, rope_original_seq_len=8),
    "llama far base": replace(SIZED["llama"], rope_theta=500_000.0, norm_eps=1e-3),
    "qwen3 wide heads, untied": SIZED["qwen3"],
    "gated": SIZED["gated"],
    "gated untied, repeated": replace(SIZED["gated"], tie_embeddings=False, layer_sharing=2, num_kv_heads=4),
    "qwen3 tied, repeated": replace(SIZED["qwen3"], tie_embeddings=True, layer_sharing=2),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_logits_and_round_trip(name, tokenizer, tmp_path):
    model = loaded(EXPORTED[name], tokenizer)
    parameters = export_huggingface(model, tmp_path / "hf")
    assert difference(model.model, tmp_path / "hf") < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == export_target(model.model.config).architecture
    assert parameters == theirs.num_parameters()
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == tokenizer.end_of_text_id
    back = import_huggingface(tmp_path / "hf")
    config = model.model.config
    assert back.model.config == replace(config, num_layers=config.depth, layer_sharing=1)
    tokens = torch.randint(config.vocab_size, (1, 20))
    if config.attention_gate:  # 1 + (w - 1) is not w to the last bit
        torch.testing.assert_close(back.model(tokens), model.model(tokens), atol=1e-5, rtol=0)
    else:
        assert torch.equal(back.model(tokens), model.model(tokens))


def test_large_weights_are_sharded(tokenizer, tmp_path):
    """With a tiny limit; transformers and LightLM read the parts, and the sum of their sizes is in the index."""
    model = loaded(SIZED["llama"], tokenizer)
    export_huggingface(model, tmp_path / "hf", shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    held = {name: part for part in shards for name in load_file(tmp_path / "hf" / part)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.model.parameters())
    assert difference(model.model, tmp_path / "hf") < 1e-5
    tokens = torch.arange(9)[None]
    assert torch.equal(import_huggingface(tmp_path / "hf").model(tokens), model.model(tokens))
    assert is_untouched_export(tmp_path / "hf")


def test_tied_head_is_stored_once(tokenizer, tmp_path):
    export_huggingface(loaded(SIZED["llama"], tokenizer), tmp_path / "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")


@settings(max_examples=80, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_configuration_is_refused_or_equal(data, tokenizer, tmp_path_factory):
    """No configuration may export to a class that computes something else."""

    def pick(*values):
        return data.draw(st.sampled_from(values))

    families = ("layernorm", "learned", "gelu"), ("rmsnorm", "rope", "swiglu")
    kind = pick(*families, *families, None)
    norm, position, mlp = kind or (
        pick("rmsnorm", "layernorm"),
        pick("rope", "learned"),
        pick("swiglu", "gelu", "gelu_erf", "relu2"),
    )
    config = ModelConfig(
        num_layers=pick(1, 2),
        hidden_size=pick(16, 24, 18),
        num_heads=pick(1, 2, 4),
        num_kv_heads=pick(0, 0, 1, 2),
        head_dim=pick(0, 0, 6, 8),
        intermediate_size=pick(0, 20),
        max_seq_len=32,
        norm=norm,
        position=position,
        mlp=mlp,
        norm_eps=pick(1e-5, 1e-2),
        rope_theta=pick(10_000.0, 100.0, 10_000),
        qk_norm=pick(False, position == "rope", True),
        attention_gate=pick(False, False, True),
        tie_embeddings=pick(False, True),
        bias=pick(False, True, position == "learned"),
        bias_in=pick("all", "all", "attention", "qkv", "mlp"),
        rope_scaling=pick("none", "none", "linear", "llama3"),
        rope_factor=pick(2, 8.0),
        rope_high_freq_factor=pick(4, 2.0),
        rope_original_seq_len=pick(0, 8),
        layer_sharing=pick(1, 2),
        sliding_window=pick(0, 0, 0, 4, 32),
        full_attention_interval=pick(1, 2),
        multipliers=pick("none", "none", "rows", "both"),
        residual_scale=pick(None, None, 0.5),
        embedding_scale=pick(1.0, 1.0, 3.0),
        base_depth=pick(0, 0, 4),
    )
    if kind == families[1] and pick(False, True):
        config = replace(
            config,
            bias=False,
            num_experts=pick(1, 2, 3, 4),
            num_experts_per_tok=pick(1, 2, 2),
            num_shared_experts=pick(0, 0, 1, 2),
            moe_intermediate_size=pick(0, 8, 10),
            first_k_dense=pick(0, 0, 1),
            router=pick("sigmoid", "softmax"),
            norm_topk_prob=pick(True, True, False),
            routed_scaling_factor=pick(1.0, 1.0, 2),
        )
    assume(not config.problems())
    model = loaded(config, tokenizer)
    folder = tmp_path_factory.mktemp("hf") / "hf"
    if export_target(config).refusal:
        with pytest.raises(ConvertError, match="cannot be exported to Hugging Face"):
            export_huggingface(model, folder)
        assert not folder.exists()
    else:
        export_huggingface(model, folder)
        assert difference(model.model, folder) < 1e-4


SCALES = {
    "multipliers": {"multipliers": "both"},
    "residual scale": {"residual_scale": 0.7},
    "QK gain": {"qk_gain": 1.3},
    "embedding scale": {"embedding_scale": 5.0},
    "base depth": {"base_depth": 5},
    "all": {"multipliers": "both", "residual_scale": 0.7, "qk_gain": 1.3, "embedding_scale": 5.0, "base_depth": 5},
}
_SOFTMAX = replace(SIZED["softmax_moe"], attention_gate=False, moe_intermediate_size=16)
CLASSES = {
    "Qwen3ForCausalLM": replace(SIZED["qwen3"], tie_embeddings=True),
    "Qwen3_5ForCausalLM": replace(SIZED["qwen3"], attention_gate=True),
    "LlamaForCausalLM": replace(SIZED["llama"], bias=True),
    "GPT2LMHeadModel": SIZED["gpt2"],
    "Glm4MoeForCausalLM": SIZED["moe"],
    "Qwen3MoeForCausalLM": replace(_SOFTMAX, qk_norm=True),
    "MixtralForCausalLM": replace(_SOFTMAX, norm_topk_prob=True),
}


def trained(config, tokenizer):
    return LoadedModel(train(replace(config, vocab_size=tokenizer.vocab_size)), tokenizer, Path("model"))


@pytest.mark.parametrize("scales", SCALES)
def test_learned_scales_fold_into_qwen3(scales, tokenizer, tmp_path):
    model = trained(replace(CLASSES["Qwen3ForCausalLM"], **SCALES[scales]), tokenizer)
    export_huggingface(model, tmp_path / "hf")
    assert difference(model.model, tmp_path / "hf") < 1e-5
    assert import_huggingface(tmp_path / "hf").model.config.folded() == model.model.config.folded()


@pytest.mark.parametrize("architecture", CLASSES)
def test_learned_scales_fold_into_every_class(architecture, tokenizer, tmp_path):
    config = replace(CLASSES[architecture], **SCALES["all"])
    assert export_target(config).architecture == architecture
    model = trained(config, tokenizer)
    export_huggingface(model, tmp_path / "hf")
    assert difference(model.model, tmp_path / "hf") < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_learned_scales_are_folded_before_weights_are_rounded(dtype, tokenizer, tmp_path):
    model = trained(replace(CLASSES["Qwen3ForCausalLM"], **SCALES["all"]), tokenizer)
    export_huggingface(model, tmp_path / "hf", dtype=dtype)
    rounded = as_plain(model).model.to(dtype).float()
    assert difference(rounded, tmp_path / "hf", dtype=torch.float32) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tokenizer, tmp_path):
    model = loaded(SIZED["qwen3"], tokenizer)
    export_huggingface(model, tmp_path / "hf", dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert {parameter.dtype for parameter in theirs.parameters()} == {dtype}
    assert difference(model.model.to(dtype).float(), tmp_path / "hf", dtype=torch.float32) < 1e-4


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen3"])
def test_auto_tokenizer_agrees(shape, tokenizer, tmp_path):
    export_huggingface(loaded(SIZED[shape], tokenizer), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in SAMPLES:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", tokenizer.end_of_text_id)
    assert (len(theirs), theirs.model_max_length) == (tokenizer.vocab_size, 48)
    batch = theirs(["The cat", "The"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape


def framed(tokenizer, tmp_path):
    """A tokenizer whose definition truncates, pads and puts a token before each text, as Llama's and BERT's do."""
    import tokenizers

    tokenizer.save(tmp_path / "plain.json")
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "plain.json"))
    raw.enable_truncation(4)
    raw.enable_padding()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.end_of_text_id)]
    )
    return Tokenizer(raw.to_str().encode(), origin="test")


def test_tokenizer_that_frames_and_truncates_texts(tokenizer, tmp_path):
    """LightLM trains without either, so the export has neither."""
    framing = framed(tokenizer, tmp_path)
    export_huggingface(loaded(SIZED["llama"], framing), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in SAMPLES:
        assert theirs(text)["input_ids"] == framing.encode(text) == tokenizer.encode(text)


def test_verification_counts_the_token_that_an_imported_tokenizer_adds(tokenizer, tmp_path):
    framing = framed(tokenizer, tmp_path)
    framing.adds_bos = True
    model = loaded(SIZED["llama"], framing)
    export_huggingface(model, tmp_path / "hf")
    check_tokenizer(model, tmp_path / "hf")
    framing.adds_bos = False
    with pytest.raises(ConvertError, match="AutoTokenizer encodes a sample text"):
        check_tokenizer(model, tmp_path / "hf")


def test_verification_names_a_tokenizer_that_transformers_replaces(tmp_path):
    """For every model of type qwen2 it splits numbers into digits, whatever tokenizer.json says."""
    numbers = train_tokenizer([" ".join(map(str, range(50, 99))) + " the cat sat"] * 2, 400)
    for kind in ("all", "qkv"):
        model = loaded(replace(SIZED["llama"], bias=True, bias_in="attention" if kind == "all" else kind), numbers)
        export_huggingface(model, tmp_path / kind)
    check_tokenizer(model, tmp_path / "all")
    with pytest.raises(
        ConvertError, match=r"type qwen2 as Qwen2Tokenizer, .* PreTrainedTokenizerFast\.from_pretrained"
    ):
        check_tokenizer(model, tmp_path / "qkv")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "qkv")
    assert theirs("52 84")["input_ids"] == numbers.encode("52 84")


def test_existing_folder_is_kept(tokenizer, tmp_path):
    model = loaded(SIZED["llama"], tokenizer)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes").write_text("mine")
    with pytest.raises(ConvertError, match="exists already"):
        export_huggingface(model, tmp_path / "hf")
    assert (tmp_path / "hf" / "notes").read_text() == "mine"
    export_huggingface(model, tmp_path / "hf", overwrite=True)
    assert not (tmp_path / "hf" / "notes").exists()


def test_untouched_export_is_told_from_a_changed_one(tokenizer, tmp_path):
    folder = tmp_path / "hf"
    export_huggingface(loaded(SIZED["llama"], tokenizer), folder)
    assert is_untouched_export(folder)
    (folder / "extra").touch()
    assert not is_untouched_export(folder)
    (folder / "extra").unlink()
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("language", "Language"))
    assert not is_untouched_export(folder)
    assert not is_untouched_export(tmp_path)


def test_fine_tuning_starts_without_dropout_and_with_all_embeddings(tokenizer, tmp_path):
    """A padding id in config.json would freeze that embedding; GPT-2's own default is dropout of 0.1."""
    export_huggingface(loaded(SIZED["gpt2"], tokenizer), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "pad_token_id" not in config
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0.0


def test_rotary_base_stands_where_both_versions_of_transformers_look(tokenizer, tmp_path):
    """transformers 4 reads rope_theta, transformers 5 rope_parameters."""
    export_huggingface(loaded(EXPORTED["llama far base"], tokenizer), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0


def test_wide_initialization_loads(tokenizer, tmp_path):
    """LlamaConfig refuses an initializer_range above 1, which says nothing about trained weights."""
    export_huggingface(loaded(replace(SIZED["llama"], init_std=1.5), tokenizer), tmp_path / "hf")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").initializer_range == 1.0


def test_verification_draws_no_bar(tmp_path, tokenizer, capsys):
    model = loaded(SIZED["llama"], tokenizer)
    export_huggingface(model, tmp_path / "hf")
    assert largest_difference(model, tmp_path / "hf", torch.float32)[0] < 1e-4
    assert "Loading weights" not in capsys.readouterr().err


@torch.no_grad()
def test_verification_counts_rounding_relative_to_the_largest_logit(tokenizer, tmp_path):
    """Rounding grows with logits, which are near 100 in GPT-2; a wrong weight of the same model is still found."""
    model = loaded(replace(SIZED["gpt2"], tie_embeddings=False), tokenizer)
    model.model.lm_head.weight.mul_(1000)
    export_huggingface(model, tmp_path / "hf")
    FORMATS["hf"].verify(model, tmp_path / "hf", torch.float32)
    difference, limit = largest_difference(model, tmp_path / "hf", torch.float32)
    assert 1e-4 < difference < limit
    model.model.norm.weight[0] += 0.1
    with pytest.raises(ConvertError, match="does not compute what model does"):
        FORMATS["hf"].verify(model, tmp_path / "hf", torch.float32)
