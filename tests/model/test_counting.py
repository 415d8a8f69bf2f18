"""Counts by arithmetic are those of the tensors."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.model.config import ModelConfig
from lightlm.model.counting import count_parameters
from lightlm.model.transformer import Transformer
from tests.test_recipe import PARAMETERS, VOCABULARY


def of_tensors(config):
    with torch.device("meta"):
        return Transformer(config).num_parameters()


@st.composite
def configs(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    values = {
        "vocab_size": draw(st.integers(1, 40)), "num_layers": draw(st.integers(1, 3)), "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([0, 1, heads])), "hidden_size": 2 * heads * draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([0, 2, 6])), "intermediate_size": draw(st.sampled_from([0, 5])),
        "max_seq_len": draw(st.integers(1, 9)), "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "position": draw(st.sampled_from(["rope", "learned"])), "qk_norm": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()), "layer_sharing": draw(st.integers(1, 2)),
        "attention_gate": draw(st.booleans()), "residual_scale": draw(st.sampled_from([None, 0.5])),
        "multipliers": draw(st.sampled_from(["none", "rows", "columns", "both"])),
    }  # fmt: skip
    if draw(st.booleans()):
        return ModelConfig(
            **values,
            mlp=draw(st.sampled_from(["swiglu", "gelu", "gelu_erf", "relu2"])),
            bias=draw(st.booleans()),
            bias_in=draw(st.sampled_from(["all", "attention", "qkv", "mlp"])),
        )
    return ModelConfig(
        **values,
        num_experts=draw(st.integers(2, 4)),
        num_shared_experts=draw(st.integers(0, 2)),
        first_k_dense=draw(st.integers(0, values["num_layers"] - 1)),
        moe_intermediate_size=draw(st.sampled_from([0, 3])),
        router=draw(st.sampled_from(["sigmoid", "softmax"])),
    )


@settings(max_examples=60)
@given(configs())
def test_any_shape(config):
    assert count_parameters(config) == of_tensors(config)


def test_a_vocabulary_must_be_known():
    with pytest.raises(ValueError, match="vocab_size"):
        count_parameters(ModelConfig(num_layers=1, hidden_size=8, num_heads=2, max_seq_len=8))


def test_the_table_of_recipes_counts_each_with_its_own_vocabulary_and_without_torch():
    code = (
        "import sys; from lightlm.cli.app import app; app(['recipes', 'ls', '--json'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    rows = {row["recipe"]: row for row in json.loads(done.stdout)}
    counted = PARAMETERS | {"finetune": None, "chat": None}  # their shape is the model's that they start from
    assert {name: row["parameters"] for name, row in rows.items()} == counted
    assert {name: rows[name]["vocab_size"] for name in VOCABULARY} == VOCABULARY
