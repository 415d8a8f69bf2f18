"""Mixtures of experts, to and from the classes of transformers that compute the same."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightlm.checkpoint import load_model, save_model
from lightlm.convert.huggingface.folder import export_huggingface, import_huggingface
from lightlm.convert.huggingface.verify import TOLERANCE, largest_difference
from lightlm.convert.samples import sample_tokens
from lightlm.errors import ConvertError, LightLMError
from lightlm.model.config import ModelConfig
from tests.convert.models import difference, edit, loaded, roughen, write
from tests.shapes import SHAPES

transformers = pytest.importorskip("transformers")

# A head_dim that is not hidden_size / num_heads, a dense first block, and 5 experts of a width that fills no tile.
BASE = ModelConfig(
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_seq_len=48,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
)
GLM = replace(BASE, num_shared_experts=2, first_k_dense=1, routed_scaling_factor=2.5)
QWEN = replace(BASE, router="softmax", qk_norm=True, first_k_dense=1)
LATENT = replace(
    GLM,
    num_kv_heads=0,
    head_dim=0,
    attention="mla",
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
)
EXPORTED = {
    "deepseek": replace(LATENT, q_lora_rank=20),
    "deepseek no latent of queries, nothing shared, untied": replace(
        LATENT, num_shared_experts=0, norm_topk_prob=False, tie_embeddings=False, rope_scaling="linear", rope_factor=2.5
    ),
    "deepseek dense": replace(SHAPES["mla"], vocab_size=0, bias=False, bias_in="all", norm_eps=1e-6),
    "deepseek repeated blocks": replace(LATENT, num_layers=2, layer_sharing=2, v_head_dim=20),
    "glm": GLM,
    "glm qk-norm, untied": replace(GLM, qk_norm=True, tie_embeddings=False),
    "glm repeated blocks": replace(GLM, num_layers=2, layer_sharing=2),
    "glm nothing shared, not normalized, all layers": replace(
        BASE, norm_topk_prob=False, rope_theta=500_000.0, num_experts_per_tok=4
    ),
    "glm one expert a token": replace(GLM, num_experts_per_tok=1, norm_topk_prob=False),
    "glm all experts": replace(GLM, num_experts=2),
    "qwen3": QWEN,
    "qwen3 not normalized, untied": replace(QWEN, norm_topk_prob=False, tie_embeddings=False, first_k_dense=0),
    "qwen3 repeated blocks": replace(QWEN, num_layers=2, layer_sharing=2),
    "mixtral": replace(BASE, router="softmax"),
    "mixtral untied, repeated": replace(BASE, router="softmax", tie_embeddings=False, layer_sharing=2, rope_theta=1e3),
}
CLASSES = {
    "deepseek": "DeepseekV3ForCausalLM",
    "glm": "Glm4MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def written_out(config):
    """Return a configuration after export and import: repeated blocks become layers."""
    return replace(
        config,
        num_layers=config.depth,
        layer_sharing=1,
        first_k_dense=config.first_k_dense * config.layer_sharing,
    )


def all_tensors(state, config):
    """The tensors of a model whose repeated blocks are layers of their own."""
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for layer in range(config.depth):
        block = f"blocks.{layer // config.layer_sharing}."
        tensors |= {f"blocks.{layer}.{name[len(block) :]}": state[name] for name in state if name.startswith(block)}
    return tensors


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name, tokenizer, tmp_path):
    model = loaded(EXPORTED[name], tokenizer)
    config = model.model.config
    parameters = export_huggingface(model, tmp_path / "hf")
    for experts in ("eager", "grouped_mm"):
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", experts_implementation=experts, output_loading_info=True
        )
        assert type(theirs).__name__ == CLASSES[name.split()[0]]
        assert [problem for problem in report.values() if problem] == []
        assert difference(model.model, theirs.eval()) < 1e-5
    assert parameters == theirs.num_parameters()
    back = import_huggingface(tmp_path / "hf").model
    assert back.config == written_out(config)
    expected = all_tensors(model.model.state_dict(), config)
    assert back.state_dict().keys() == expected.keys()
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 48,
    "num_experts_per_tok": 2,
}
GLM4 = {
    **SIZES,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 5,
    "partial_rotary_factor": 1.0,
    "routed_scaling_factor": 2.5,
}
QWEN3 = {**SIZES, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 5}
DEEPSEEK = {
    **{key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")},
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 5,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "deepseek_v3": (transformers.DeepseekV3Config, {**DEEPSEEK, "n_shared_experts": 2}),
    "deepseek_v3 no latent of queries, tied": (
        transformers.DeepseekV3Config,
        {**DEEPSEEK, "q_lora_rank": None, "tie_word_embeddings": True, "norm_topk_prob": False},
    ),
    "glm4_moe": (transformers.Glm4MoeConfig, {**GLM4, "n_shared_experts": 2}),
    "glm4_moe qk-norm, tied": (transformers.Glm4MoeConfig, {**GLM4, "use_qk_norm": True, "tie_word_embeddings": True}),
    "glm4_moe all layers, nothing shared": (
        transformers.Glm4MoeConfig,
        {**GLM4, "first_k_dense_replace": 0, "n_shared_experts": 0, "norm_topk_prob": False},
    ),
    "qwen3_moe": (transformers.Qwen3MoeConfig, QWEN3),
    "qwen3_moe dense first, tied": (
        transformers.Qwen3MoeConfig,
        {**QWEN3, "mlp_only_layers": [0, 1], "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "mixtral": (transformers.MixtralConfig, {**SIZES, "intermediate_size": 24, "num_local_experts": 5}),
    "mixtral tied": (
        transformers.MixtralConfig,
        {**SIZES, "intermediate_size": 24, "num_local_experts": 5, "head_dim": None, "tie_word_embeddings": True},
    ),
}


def build(family, vocab_size, **changes):
    config_class, values = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**{**values, **changes}, vocab_size=vocab_size, eos_token_id=0, bos_token_id=0)
    return roughen(transformers.AutoModelForCausalLM.from_config(config))


def test_a_trained_deepseek_is_the_same_in_both_directions(tokenizer, tmp_path):
    model = loaded(EXPORTED["deepseek"], tokenizer)
    tokens_BT = sample_tokens(model)[:, : model.model.config.max_seq_len]
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        logits_BTV = model.model(tokens_BT[:, :-1])
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
        optimizer.step()
    export_huggingface(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert difference(model.model, theirs) < 1e-4
    back = import_huggingface(write(theirs, tokenizer, tmp_path / "again")).model
    assert difference(back, theirs) < 1e-4


@pytest.mark.parametrize("first", [3, 60])
def test_a_deepseek_of_dense_layers_has_no_experts(first, tokenizer, tmp_path):
    theirs = build("deepseek_v3", tokenizer.vocab_size, first_k_dense_replace=first)
    model = import_huggingface(write(theirs, tokenizer, tmp_path / "hf")).model
    assert model.config.num_experts == 0
    assert difference(model, theirs) < 1e-5


@pytest.mark.parametrize("original", [True, False], ids=["an expert a tensor", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_import(family, original, tokenizer, tmp_path):
    theirs = build(family, tokenizer.vocab_size + 5)
    path = write(theirs, tokenizer, tmp_path / "hf", save_original_format=original)
    assert any("experts.gate_up_proj" in name for name in load_file(path / "model.safetensors")) is not original
    model = import_huggingface(path)
    assert difference(model.model, theirs) < 1e-5
    save_model(tmp_path / "ours", model.model, model.tokenizer)
    assert difference(load_model(tmp_path / "ours").model, theirs) < 1e-5


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe dense first, tied", "mixtral"])
def test_export_of_an_import_is_the_file_it_came_from(family, tokenizer, tmp_path):
    theirs = write(build(family, tokenizer.vocab_size), tokenizer, tmp_path / "hf")
    export_huggingface(import_huggingface(theirs), tmp_path / "back")
    expected, given = (load_file(path / "model.safetensors") for path in (theirs, tmp_path / "back"))
    assert expected.keys() == given.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, given[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selection_biases_stay_fp32(dtype, tokenizer, tmp_path):
    """In bf16, steps of 0.001 would be lost, and with them the balance of the experts."""
    model = loaded(GLM, tokenizer)
    bias = model.model.blocks[1].mlp.router.selection_bias.clone()
    export_huggingface(model, tmp_path / "hf", dtype=dtype)
    state = load_file(tmp_path / "hf" / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if tensor.dtype != dtype}
    assert set(kept) == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    assert torch.equal(kept["model.layers.1.mlp.gate.e_score_correction_bias"], bias)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(theirs.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert largest_difference(model, tmp_path / "hf", dtype)[0] < TOLERANCE
    back = import_huggingface(tmp_path / "hf").model.to(dtype)
    assert torch.equal(back.blocks[1].mlp.router.selection_bias, bias)


def test_biases_are_compared(tokenizer, tmp_path):
    """--verify also checks the choice of experts."""
    model = loaded(GLM, tokenizer)
    export_huggingface(model, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.mlp.gate.e_score_correction_bias"].neg_()
    save_file(state, path, metadata={"format": "pt"})
    difference, limit = largest_difference(model, tmp_path / "hf", torch.float32)
    assert difference > 100 * limit


def test_widths_that_grouped_products_refuse(tokenizer, tmp_path):
    """transformers' default fails unless rows are whole 16 bytes: 4 numbers in float32, 8 in bfloat16."""
    model = loaded(replace(GLM, moe_intermediate_size=18), tokenizer)
    export_huggingface(model, tmp_path / "hf")
    assert difference(model.model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()) < 1e-5
    edit(tmp_path / "hf" / "config.json", experts_implementation="DELETED")
    assert largest_difference(import_huggingface(tmp_path / "hf"), tmp_path / "hf", torch.float32)[0] < TOLERANCE


@torch.no_grad()
def test_a_tie_of_two_experts_may_go_either_way(tokenizer, tmp_path):
    """If two experts score alike, the order of sums decides between them, not the conversion."""
    model = loaded(replace(GLM, num_layers=2), tokenizer)
    router = model.model.blocks[1].mlp.router
    tokens = sample_tokens(model)
    routed = []
    hook = router.register_forward_hook(lambda *arguments: routed.append(arguments[-1]))
    model.model(tokens)
    hook.remove()
    best = (routed[0][2] + router.selection_bias)[20].topk(3)  # the first sequence's 21st token
    beaten = best.indices[2]
    bias = router.selection_bias[beaten] + best.values[1] - best.values[2]
    differences = []
    for gap in (1e-6, 1e-3):
        router.selection_bias[beaten] = bias - gap
        export_huggingface(model, tmp_path / "hf", overwrite=True)
        path = tmp_path / "hf" / "model.safetensors"
        state = load_file(path)
        state["model.layers.1.mlp.gate.e_score_correction_bias"][beaten] += 2 * gap
        save_file(state, path, metadata={"format": "pt"})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        assert (model.model(tokens) - theirs(tokens).logits)[0, 20].abs().max() > 10 * TOLERANCE
        differences.append(largest_difference(model, tmp_path / "hf", torch.float32))
    assert [difference <= limit for difference, limit in differences] == [True, False]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glm repeated blocks", {"first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "use_qk_norm": False}),
        ("glm", {"num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0, "n_shared_experts": 2}),
        ("qwen3 repeated blocks", {"mlp_only_layers": [0, 1], "decoder_sparse_step": 1}),
        ("qwen3", {"num_experts": 5, "num_local_experts": 5}),
        ("mixtral", {"num_local_experts": 5, "intermediate_size": 24, "rope_theta": 10_000.0}),
    ],
)
def test_settings_stand_where_both_versions_of_transformers_look(name, expected, tokenizer, tmp_path):
    """transformers 4 reads the rotary settings at the top, transformers 5 in rope_parameters first."""
    export_huggingface(loaded(EXPORTED[name], tokenizer), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"] == {"rope_type": "default"} | {
        key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config
    }
    assert ("partial_rotary_factor" in config) is name.startswith("glm")  # the class rotates half of a head by default


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe", "mixtral"])
def test_config_written_by_transformers_4(family, tokenizer, tmp_path):
    theirs = build(family, tokenizer.vocab_size, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    path = write(theirs, tokenizer, tmp_path / "hf")
    old = {"rope_parameters": "DELETED", "rope_scaling": None, "rope_theta": 500.0}
    old |= {"glm4_moe": {"partial_rotary_factor": 1.0}, "qwen3_moe": {"num_experts": 5}}.get(family, {})
    edit(path / "config.json", **old)
    if family == "qwen3_moe":
        edit(path / "config.json", num_local_experts="DELETED")
    assert difference(import_huggingface(path).model, theirs) < 1e-5


def test_missing_rotary_base_is_the_class_s_own(tokenizer, tmp_path):
    theirs = build("mixtral", tokenizer.vocab_size)
    path = write(theirs, tokenizer, tmp_path / "hf")
    edit(path / "config.json", rope_parameters="DELETED")
    assert import_huggingface(path).model.config.rope_theta == 1_000_000.0
    assert difference(import_huggingface(path).model, theirs) < 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("glm4_moe", {"n_group": 2, "topk_group": 2}, ["n_group is 2, must be 1", "topk_group is 2"]),
        ("glm4_moe", {"attention_bias": True}, ["attention_bias is True"]),
        ("glm4_moe", {"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
        ("glm4_moe", {"n_routed_experts": "DELETED"}, ["n_routed_experts is missing"]),
        ("glm4_moe", {"first_k_dense_replace": 3}, ["first_k_dense", "no layer of experts"]),
        ("glm4_moe", {"num_experts_per_tok": 6}, ["num_experts_per_tok", "num_experts, 5, is 6"]),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
        ("glm4_moe", {"rope_parameters": {"rope_theta": 1e4}}, ["partial_rotary_factor is 0.5, must be 1.0"]),
        ("glm4_moe", {"rope_parameters": "DELETED"}, ["partial_rotary_factor is 0.5"]),
        (
            "glm4_moe",
            {"rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 1.0}},
            ["rope_type 'yarn'", "it computes 'default', 'linear', 'llama3'"],
        ),
        ("deepseek_v3", {"n_group": "DELETED"}, ["n_group is missing, which means 8, must be 1"]),
        ("deepseek_v3", {"topk_group": 2}, ["topk_group is 2, must be 1"]),
        ("deepseek_v3", {"rope_interleave": False}, ["rope_interleave is False, must be True"]),
        ("deepseek_v3", {"attention_bias": True}, ["attention_bias is True"]),
        ("deepseek_v3", {"head_dim": 2}, ["head_dim is 2, must be qk_rope_head_dim, 6"]),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}}, ["rope_type 'yarn'"]),
        (
            "deepseek_v3",
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": 0.7}},
            ["rope_scaling has mscale_all_dim 0.7"],
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step is 2, must be 1"]),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ["mlp_only_layers is [1], must be the first layers"]),
        ("qwen3_moe", {"mlp_only_layers": 1}, ["mlp_only_layers is 1"]),
        ("qwen3_moe", {"use_sliding_window": True}, ["use_sliding_window is True"]),
        ("qwen3_moe", {"num_local_experts": "DELETED"}, ["num_experts is missing"]),
        ("mixtral", {"sliding_window": 16}, ["sliding_window is 16"]),
        ("mixtral", {"layer_types": ["sliding_attention"] * 3}, ["layer_types has sliding_attention"]),
        ("mixtral", {"num_experts_per_tok": 1}, ["norm_topk_prob", "its weight would always be 1"]),
        ("mixtral", {"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "'awq'"]),
    ],
)
def test_refused_configurations(family, changes, named, tokenizer, tmp_path):
    path = write(build(family, tokenizer.vocab_size), tokenizer, tmp_path / "hf")
    edit(path / "config.json", **changes)
    with pytest.raises(ConvertError) as error:
        import_huggingface(path)
    assert [name for name in [*named, "config.json"] if name not in str(error.value)] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.experts.3.up_proj.weight": None}, r"experts\.3\.up_proj\.weight is missing"),
        ({"model.layers.1.mlp.gate.e_score_correction_bias": None}, r"e_score_correction_bias is missing"),
        ({"model.layers.1.mlp.experts.5.up_proj.weight": (24, 32)}, r"experts\.5\.up_proj\.weight belongs to no part"),
        (
            {"model.layers.1.mlp.experts.2.up_proj.weight": (24, 30)},
            r"experts\.0\.up_proj\.weight and those of the oth",
        ),
        ({"model.layers.1.mlp.shared_experts.up_proj.weight": (24, 32)}, r"shared\.up_proj\.weight has shape \(24, 32"),
        # A layer for speculative decoding, as some published models have; reading without it would lose its head.
        ({"model.layers.3.eh_proj.weight": (32, 64)}, r"layers\.3\.eh_proj\.weight belongs to no part of Glm4Moe"),
    ],
)
def test_weights_that_do_not_fit(changes, message, tokenizer, tmp_path):
    path = write(build("glm4_moe", tokenizer.vocab_size), tokenizer, tmp_path / "hf") / "model.safetensors"
    state = load_file(path)
    for name, shape in changes.items():
        state.pop(name, None)
        if shape:
            state[name] = torch.zeros(shape)
    save_file(state, path)
    with pytest.raises(LightLMError, match=message):
        import_huggingface(path.parent)
