import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace

import pytest

from lightlm.convert.huggingface.layouts import LAYOUTS, export_target
from lightlm.model.config import FOLDABLE_FIELDS, ModelConfig
from tests.shapes import SHAPES

GPT2, LLAMA, QWEN3 = SHAPES["gpt2"], SHAPES["llama"], SHAPES["qwen3"]
MOE = replace(LLAMA, num_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (GPT2, "GPT2LMHeadModel"),
        (replace(GPT2, bias=False, mlp="gelu_erf"), "GPT2LMHeadModel"),
        (LLAMA, "LlamaForCausalLM"),
        (replace(LLAMA, bias=True), "LlamaForCausalLM"),
        (replace(LLAMA, head_dim=16, layer_sharing=3), "LlamaForCausalLM"),
        (QWEN3, "Qwen3ForCausalLM"),
        (replace(QWEN3, hidden_size=34), "Qwen3ForCausalLM"),
        (replace(LLAMA, bias=True, bias_in="qkv"), "Qwen2ForCausalLM"),
        (replace(LLAMA, mlp="relu2"), "ArceeForCausalLM"),
        (replace(GPT2, position="rope"), "Starcoder2ForCausalLM"),
        (replace(QWEN3, hidden_size=34, attention_gate=True), "Qwen3_5ForCausalLM"),
        # A window that hides nothing.
        (replace(LLAMA, sliding_window=48), "LlamaForCausalLM"),
        (replace(LLAMA, sliding_window=5, full_attention_interval=1), "LlamaForCausalLM"),
        (replace(LLAMA, vocab_size=0), "LlamaForCausalLM"),
        (replace(MOE, num_shared_experts=1, routed_scaling_factor=2.5, first_k_dense=1), "Glm4MoeForCausalLM"),
        (replace(MOE, qk_norm=True, norm_topk_prob=False), "Glm4MoeForCausalLM"),
        (replace(MOE, router="softmax"), "MixtralForCausalLM"),
        (SHAPES["deepseek"], "DeepseekV3ForCausalLM"),
        (replace(LLAMA, num_kv_heads=0, attention="mla"), "DeepseekV3ForCausalLM"),
        (replace(MOE, router="softmax", qk_norm=True, first_k_dense=1, norm_topk_prob=False), "Qwen3MoeForCausalLM"),
    ],
)
def test_class(config, architecture):
    target = export_target(config)
    assert (target.architecture, target.refusal) == (architecture, "")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(LLAMA, sliding_window=5), ["LlamaForCausalLM", "sliding_window: 5"]),
        (replace(GPT2, sliding_window=5), ["GPT2LMHeadModel", "sliding_window: 5"]),
        (replace(QWEN3, sliding_window=5), ["Qwen3ForCausalLM", "sliding_window: 5"]),
        (replace(LLAMA, mlp="relu2", qk_norm=True), ["ArceeForCausalLM", "qk_norm: true (must be false)"]),
        (replace(LLAMA, mlp="gelu"), ["LlamaForCausalLM", "mlp: gelu (must be swiglu)"]),
        (replace(LLAMA, norm="layernorm"), ["LlamaForCausalLM", "norm: layernorm (must be rmsnorm)"]),
        (replace(LLAMA, norm="layernorm", mlp="gelu"), ["Starcoder2ForCausalLM", "bias: false (must be true)"]),
        (replace(GPT2, norm="rmsnorm"), ["GPT2LMHeadModel", "norm: rmsnorm (must be layernorm)"]),
        (replace(GPT2, qk_norm=True, num_kv_heads=2), ["qk_norm: true", "num_kv_heads: 2"]),
        (replace(GPT2, head_dim=16), ["head_dim: 16"]),
        (SHAPES["mla"], ["DeepseekV3ForCausalLM", "bias: true (must be false)"]),
        (replace(SHAPES["deepseek"], num_experts=1, num_experts_per_tok=1, norm_topk_prob=False), ["num_experts: 1"]),
        (SHAPES["mla_banded"], ["DeepseekV3ForCausalLM", "sliding_window: 6"]),
        (replace(SHAPES["deepseek"], router="softmax"), ["DeepseekV3ForCausalLM", "router: softmax (must be sigmoid)"]),
        (replace(QWEN3, bias=True), ["Qwen3ForCausalLM", "bias: true"]),
        (replace(LLAMA, attention_gate=True), ["Qwen3_5ForCausalLM", "qk_norm: false (must be true)"]),
        (replace(QWEN3, attention_gate=True, sliding_window=5), ["Qwen3_5ForCausalLM", "sliding_window: 5"]),
        (replace(MOE, attention_gate=True), ["Glm4MoeForCausalLM", "attention_gate: true (must be false)"]),
        (replace(GPT2, attention_gate=True), ["GPT2LMHeadModel", "attention_gate: true (must be false)"]),
        (replace(LLAMA, hidden_size=34, head_dim=8), ["num_heads: 4", "hidden_size: 34"]),
        (replace(MOE, sliding_window=5), ["Glm4MoeForCausalLM", "sliding_window: 5"]),
        (replace(MOE, num_experts=1, num_experts_per_tok=1, norm_topk_prob=False), ["num_experts: 1"]),
        (replace(MOE, norm="layernorm"), ["Glm4MoeForCausalLM", "norm: layernorm (must be rmsnorm)"]),
        (
            replace(MOE, router="softmax", qk_norm=True, num_shared_experts=2, routed_scaling_factor=2.5),
            ["Qwen3MoeForCausalLM", "num_shared_experts: 2 (with router: sigmoid", "routed_scaling_factor: 2.5"],
        ),
        (
            replace(MOE, router="softmax", first_k_dense=1, norm_topk_prob=False, num_shared_experts=1),
            ["MixtralForCausalLM", "first_k_dense: 1", "norm_topk_prob: false", "num_shared_experts: 1"],
        ),
    ],
)
def test_refusal_names_the_keys(config, named):
    target = export_target(config)
    assert target.architecture == target.model_type == ""
    assert [name for name in named if name not in target.refusal] == []


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_field_is_placed_in_every_layout(model_type):
    """A new ModelConfig field needs a key, a fixed value or a rule in each layout; until then it refuses to export.

    What folds into other weights needs none, because layouts see the folded configuration.
    """
    layout, names = LAYOUTS[model_type], {field.name for field in fields(ModelConfig)}
    assert names == {*layout.keys, *layout.choices, *layout.fixed, *layout.rules, *FOLDABLE_FIELDS}
    assert not set(FOLDABLE_FIELDS) & {*layout.keys, *layout.choices, *layout.fixed, *layout.rules}


@dataclass(frozen=True, kw_only=True)
class WiderConfig(ModelConfig):
    """A configuration with a field that no layout places."""

    attention_sink: bool = False


@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN3, MOE, replace(MOE, router="softmax")])
def test_a_field_that_no_layout_places_refuses_unless_it_has_its_default(config):
    plain = WiderConfig(**asdict(config))
    assert export_target(plain) == export_target(config)
    refusal = export_target(replace(plain, attention_sink=True)).refusal
    assert f"{export_target(config).architecture}, the nearest" in refusal
    assert "cannot have attention_sink: true (no equivalent in this class)" in refusal


def test_a_configuration_that_is_not_a_model_is_an_error():
    with pytest.raises(ValueError, match="num_heads"):
        export_target(ModelConfig(num_layers=1, hidden_size=10, num_heads=3, max_seq_len=8))


def test_is_light():
    """Reading a recipe asks `export_target`, `--help` lists the formats, and neither must wait for torch."""
    modules = "lightlm.convert.huggingface.layouts, lightlm.convert.formats"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
