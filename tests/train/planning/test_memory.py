import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightlm.model import experts, fused, transformer
from lightlm.model.attention import build_document_mask, offsets_in_documents
from lightlm.model.config import ModelConfig
from lightlm.model.dropout import Dropout
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.optim.registry import read_section
from lightlm.train.planning import memory
from lightlm.train.planning.memory import inference_parts, optimizer_bytes
from lightlm.train.step import activations, loss
from lightlm.train.step.activations import activation_bytes, backward_bytes, document_mask_bytes, mask_bytes
from lightlm.train.step.loss import token_loss
from tests.shapes import SHAPES

LENGTH = 16


def saved_bytes(config, sequences, dtype, length=LENGTH, dropout=0.0, ends=None, mtp_depth=0):
    """Storage of all that autograd saves in a forward pass; `ends`: of documents that are attended to alone."""
    dropped = Dropout(dropout, 1, torch.arange(sequences)) if dropout else None
    model = Transformer(config, mtp_depth)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no storage takes another's place
        return tensor

    tokens = torch.randint(config.vocab_size, (sequences, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        offsets = None
        if ends is not None:
            begins = torch.isin(torch.arange(length), torch.tensor(ends)).int().expand(sequences, -1)
            offsets = offsets_in_documents(begins, 1)
        states = []
        output = model.hidden_states(tokens, dropout=dropped, offsets_BT=offsets, mtp_states=states)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.fixture
def unpadded(monkeypatch):
    """Experts have a row for each choice and no more; how many they pad depends on what tokens choose."""
    for name, value in {"_ROW_MULTIPLE": 1, "_UNITS_PER_EXPERT": 10**6, "_BATCHED_QUANTILE": 0.0}.items():
        monkeypatch.setattr(experts, name, value)
    monkeypatch.setattr(activations, "_PADDING", 1.0)


def indices_of_rows(config):
    """Where experts' rows are, which autograd does not save but keeps: 16 bytes a row, 8 a choice, in each layer."""
    layers = sum(config.has_experts(block) for block in range(config.num_layers)) * config.layer_sharing
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
    assert activation_bytes(config, mixed=mixed, fused=True) == pytest.approx(expected, rel=rel)


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek"])
@pytest.mark.parametrize("fused_layers", [True, False])
def test_heads_of_multi_token_prediction_are_counted(name, fused_layers, monkeypatch):
    config = SHAPES[name]
    if not fused_layers:
        monkeypatch.setattr("lightlm.model.fused.applies", lambda x: False)
        monkeypatch.setattr(experts, "_has_grouped_mm", lambda x, weight: True)  # as on CUDA
    found = {}
    for depth in (1, 2):
        saved = [saved_bytes(config, sequences, torch.bfloat16, mtp_depth=depth) for sequences in (3, 1)]
        found[depth] = (saved[0] - saved[1]) / (2 * LENGTH)
    counted = [activation_bytes(config, mixed=True, fused=fused_layers, mtp_depth=depth) for depth in (1, 2)]
    kept = found[2] - found[1]
    if config.num_experts and fused_layers:
        kept += 24 * config.num_experts_per_tok  # as in `indices_of_rows`
    # RMSNorm's output, and so the states that a head normalizes, may have 16 bits: the count is a bound from above.
    assert 0.999 < (counted[1] - counted[0]) / kept < 1.05


@pytest.mark.parametrize("name", ["qwen3", "shared", "gpt2"])
def test_dropout_keeps_a_byte_per_value(name):
    config = SHAPES[name]
    saved = [saved_bytes(config, sequences, torch.bfloat16, dropout=0.1) for sequences in (3, 1)]
    expected = (saved[0] - saved[1]) / (2 * LENGTH) - 8
    assert activation_bytes(config, mixed=True, fused=True, dropout=True) == pytest.approx(expected, rel=1e-6)


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


class Peak(TorchDispatchMode):
    """The bytes that operations hold at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage):
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key, size):
        self._seen.remove(key)
        self.live -= size


def peak_bytes(config, sequences, dtype, recompute):
    torch.manual_seed(0)
    model = Transformer(config)
    model.recompute_blocks = recompute
    tokens = torch.randint(config.vocab_size, (sequences, config.max_seq_len))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Peak() as peak:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model.hidden_states(tokens, routings=[])
        output.backward(torch.ones_like(output))
    return peak.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts_each", [0, 8])
def test_the_peak_of_a_pass_and_what_recomputation_saves_of_it(experts_each, dtype):
    """A bound from above: what is counted as held at once mostly is."""
    config = ModelConfig(num_layers=6, hidden_size=128, num_heads=4, num_kv_heads=2, max_seq_len=64, vocab_size=97)
    if experts_each:
        config = replace(config, num_experts=experts_each, num_shared_experts=1, moe_intermediate_size=128)
    mixed, counted = dtype != torch.float32, []
    for recompute, at_least in ((False, 0.9), (True, 0.6)):
        measured = (peak_bytes(config, 24, dtype, recompute) - peak_bytes(config, 8, dtype, recompute)) / (16 * 64)
        counted.append(activation_bytes(config, mixed=mixed, fused=True, recompute=recompute))
        assert at_least < measured / (counted[-1] + backward_bytes(config, mixed=mixed)) < 1.02
    assert counted[1] < counted[0] / 2


@pytest.mark.parametrize("tokens", [16, 32])
@pytest.mark.parametrize("slow_mkl", [False, True])
def test_the_peak_of_the_head_in_fp32(slow_mkl, tokens, monkeypatch):
    monkeypatch.setattr(loss, "has_slow_mkl", lambda: slow_mkl)
    monkeypatch.setitem(loss._CHUNK, "cpu", 16)
    x_ND, weight_VD = torch.randn(tokens, 64, requires_grad=True), torch.randn(2048, 64, requires_grad=True)
    with Peak() as peak:
        loss._HeadLoss.apply(x_ND, weight_VD, torch.zeros(tokens, dtype=torch.long), 0.0, None)
    weight_and_gradient = 2 * weight_VD.nbytes  # which are counted elsewhere
    counted = loss.head_loss_bytes(tokens, 64, 2048, "cpu", torch.float32, accumulates=False)
    assert peak.peak == pytest.approx(counted + weight_and_gradient, rel=0.02)


def test_copies_that_join_layers_are_counted():
    for config in SHAPES.values():
        model = Transformer(config)
        with fused.kept_weight_copies():
            model.hidden_states(torch.zeros(1, 8, dtype=torch.long))
            copied = sum(copy.numel() for copy in fused._copies.values())
        assert memory._joined(model) == copied, config


def test_rows_are_padded_as_assumed():
    """8,192 tokens whose experts' loads vary by a fifth, as in a run that balances them."""
    generator = torch.Generator().manual_seed(0)
    for num_experts, chosen in ((16, 2), (32, 4)):
        preference_E = 0.12 * torch.randn(num_experts, generator=generator)
        noise_NE = -torch.empty(8192, num_experts).exponential_(generator=generator).log()
        ids_NK = (preference_E + noise_NE).topk(chosen).indices
        load_E = torch.bincount(ids_NK.flatten(), minlength=num_experts).double()
        assert 0.05 < load_E.std() / load_E.mean() < 0.25
        rows = len(experts._Rows.of(ids_NK, num_experts).pair_R)
        assert rows / ids_NK.numel() == pytest.approx(activations._PADDING, abs=0.1)


def test_banded_layers_keep_a_mask_each():
    config = replace(SHAPES["gpt3"], num_layers=4)
    whole = replace(config, sliding_window=0)
    extra = saved_bytes(config, 1, torch.bfloat16, 48) - saved_bytes(whole, 1, torch.bfloat16, 48)
    assert mask_bytes(config, 48, mixed=True) == pytest.approx(extra, rel=1e-6)
    assert mask_bytes(whole, 48, mixed=True) == 0


@pytest.mark.parametrize("name", ["llama", "gpt3"])
@pytest.mark.parametrize(("compiled", "ends"), [(False, []), (False, [20, 30]), (True, [20, 30])])
def test_masks_of_documents(name, compiled, ends, monkeypatch):
    """One document fills each sequence at worst; with banded layers, its mask is then as large as the sequence's."""
    monkeypatch.setattr(
        transformer,
        "build_document_mask",
        lambda *args, **kw: build_document_mask(*args, **{**kw, "compiled": compiled}),
    )
    config = SHAPES[name].resolved()
    masks = {"mixed": True, "device_type": "cpu", "compiled": compiled, "recompute": False}
    counted = document_mask_bytes(config, 48, 3, **masks)
    without = saved_bytes(replace(config, sliding_window=0), 3, torch.bfloat16, 48)
    extra = saved_bytes(config, 3, torch.bfloat16, 48, ends=ends) - without
    if name == "gpt3":  # the same positions in all sequences before, now each its own
        extra -= 2 * 48 * 8
    if ends and not compiled and name == "gpt3":
        assert 0 < extra < counted
    else:
        assert counted == pytest.approx(extra, rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_is_counted(name):
    model = Transformer(SHAPES["qwen3"])
    section = read_section({"name": name, "lr": 1e-3})
    optimizer = build_optimizer(model, section, torch.float32)
    token_loss(model, torch.randint(97, (1, 8)), torch.randint(97, (1, 8))).backward()
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    assert optimizer_bytes(model, section) == sum(value.nbytes for value in state)


@pytest.mark.parametrize("name", ["shared", "mla", "mla_banded"])
def test_inference_counts_the_cache_that_generation_makes(name):
    model = Transformer(SHAPES[name])
    cache = model.new_cache(1)
    parts = inference_parts(model)
    assert parts["cache_float32"] == 2 * parts["cache_bfloat16"] == cache.pairs.nbytes
    assert parts["token_float32"] == 2 * parts["token_bfloat16"] == cache.pairs.nbytes / model.config.max_seq_len
    assert parts["weights_float32"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is inherited on Linux")
def test_a_process_does_not_report_the_peak_of_the_one_that_started_it():
    block = b"x" * 800_000_000
    code = (
        "import torch; from lightlm.train.observe.metrics import peak_memory; print(peak_memory(torch.device('cpu')))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(outcome.stdout) < len(block)
