import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lightlm.model import experts
from lightlm.model.transformer import Transformer
from lightlm.recipe import OptimizerSection
from lightlm.train import memory
from lightlm.train.loss import token_loss
from lightlm.train.memory import activation_bytes, inference_parts, mask_bytes, optimizer_bytes
from lightlm.train.optimizers import build_optimizer
from tests.shapes import SHAPES

LENGTH = 16


def saved_bytes(config, sequences, dtype, length=LENGTH):
    """Storage of all that autograd saves in a forward pass."""
    model = Transformer(config)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no storage takes another's place
        return tensor

    tokens = torch.randint(config.vocab_size, (sequences, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        output = model.hidden_states(tokens)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.fixture
def unpadded(monkeypatch):
    """Experts have a row for each choice and no more; how many they pad depends on what tokens choose."""
    for name, value in {"_ROW_MULTIPLE": 1, "_UNITS_PER_EXPERT": 10**6, "_BATCHED_QUANTILE": 0.0}.items():
        monkeypatch.setattr(experts, name, value)
    monkeypatch.setattr(memory, "_PADDING", 1.0)


def indices_of_rows(config):
    """Where experts' rows are, which autograd does not save but keeps: 16 bytes a row, 8 a choice, in each layer."""
    layers = sum(config.has_experts(block) for block in range(config.num_layers)) * config.block_repeats
    return layers * 24 * config.num_experts_per_tok


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_what_autograd_keeps(name, dtype):
    mixed = dtype == torch.bfloat16
    # Weights and masks do not depend on the number of sequences; token ids are 8 bytes a token.
    config = SHAPES[name]
    a_token = (saved_bytes(config, 3, dtype) - saved_bytes(config, 1, dtype)) / (2 * LENGTH) - 8
    # The balance loss of a sequence keeps two numbers for each expert.
    rel = 1e-3 if config.num_experts else 1e-6
    expected = a_token + indices_of_rows(config)
    assert activation_bytes(config, mixed=mixed, fused=mixed) == pytest.approx(expected, rel=rel)


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_operations_under_autocast(dtype, monkeypatch):
    mixed = dtype == torch.bfloat16
    monkeypatch.setattr("lightlm.model.fused.applies", lambda x: False)
    monkeypatch.setattr(experts, "_has_grouped_mm", lambda x, weight: mixed)  # as on CUDA
    for config in SHAPES.values():
        a_token = (saved_bytes(config, 3, dtype) - saved_bytes(config, 1, dtype)) / (2 * LENGTH) - 8
        expected = a_token + (0 if mixed else indices_of_rows(config))
        assert activation_bytes(config, mixed=mixed, fused=False) == pytest.approx(expected, rel=0.05), config


def test_banded_layers_keep_a_mask_each():
    config = replace(SHAPES["gpt3"], num_layers=4)
    whole = replace(config, sliding_window=0)
    extra = saved_bytes(config, 1, torch.bfloat16, 48) - saved_bytes(whole, 1, torch.bfloat16, 48)
    assert mask_bytes(config, 48, mixed=True) == pytest.approx(extra, rel=1e-6)
    assert mask_bytes(whole, 48, mixed=True) == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_is_counted(name):
    model = Transformer(SHAPES["qwen3"])
    section = OptimizerSection(name=name, lr=1e-3)
    optimizer = build_optimizer(model, section)
    token_loss(model, torch.randint(97, (1, 8)), torch.randint(97, (1, 8))).backward()
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    assert optimizer_bytes(model, section) == sum(value.nbytes for value in state)


def test_inference_counts_the_cache_that_generation_makes():
    model = Transformer(SHAPES["shared"])
    cache = model.new_cache(1)
    parts = inference_parts(model)
    assert parts["cache_float32"] == 2 * parts["cache_bfloat16"] == cache.keys.nbytes + cache.values.nbytes
    assert parts["weights_float32"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is inherited on Linux")
def test_a_process_does_not_report_the_peak_of_the_one_that_started_it():
    block = b"x" * 800_000_000
    code = "import torch; from lightlm.train.metrics import peak_memory; print(peak_memory(torch.device('cpu')))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(outcome.stdout) < len(block)
