"""Attention inside documents computes what documents run one by one compute."""

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch

from lightlm.model import attention, transformer
from lightlm.model.attention import Mask, build_document_mask, offsets_in_documents
from lightlm.model.transformer import Block, Transformer
from lightlm.train.step.loss import target_losses, token_loss
from tests.shapes import SHAPES, build

SEPARATOR = 0


def rows():
    """Inputs and targets: documents of 1 to 40 tokens, one that begins a row, and two separators in a row."""
    tokens = torch.randint(1, 97, (3, 41), generator=torch.Generator().manual_seed(0))
    tokens[0, [0, 5, 6, 20]] = tokens[1, [13, 39]] = SEPARATOR
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


INPUTS, TARGETS = rows()
OFFSETS = offsets_in_documents(INPUTS, SEPARATOR)


def one_by_one(model):
    """The loss of all documents, each in a call of its own."""
    total = 0.0
    for row, targets in zip(INPUTS, TARGETS, strict=True):
        starts = [0, *(i for i in range(1, len(row)) if row[i] == SEPARATOR), len(row)]
        for start, end in itertools.pairwise(starts):
            total = total + token_loss(model, row[None, start:end], targets[None, start:end].contiguous())
    return total


def gradients(model, loss):
    model = copy.deepcopy(model)
    total = loss(model)
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def masked(model):
    return token_loss(model, INPUTS, TARGETS, OFFSETS)


def hide_scores(monkeypatch):
    """Take the way of devices that cannot skip scores."""
    monkeypatch.setattr(
        transformer, "build_document_mask", lambda *args, **kw: build_document_mask(*args, **{**kw, "compiled": True})
    )


@pytest.mark.parametrize("way", ["documents alone", "hidden scores", "recomputed"])
@pytest.mark.parametrize("name", SHAPES)
def test_losses_and_gradients_are_those_of_documents_run_one_by_one(name, way, monkeypatch):
    model = build(name).train()
    expected, wanted = gradients(model, one_by_one)
    if way == "hidden scores":
        hide_scores(monkeypatch)
    model.recompute_blocks = way == "recomputed"
    found, ours = gradients(model, masked)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(token_loss(model, INPUTS, TARGETS).item(), rel=3e-5)
    for key, gradient in wanted.items():
        torch.testing.assert_close(ours[key], gradient, atol=1e-3, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["gpt3", "gated"])
def test_compiled_blocks_compute_the_same(name, monkeypatch):
    run = functools.cache(lambda: torch.compile(Block._run, backend="aot_eager"))  # traced, without C++
    monkeypatch.setattr(transformer, "_compiled_run", run)
    model = build(name).train()
    expected, wanted = gradients(model, masked)
    model.compile_blocks()
    found, ours = gradients(model, masked)
    assert found == pytest.approx(expected, rel=1e-6)
    for key, gradient in wanted.items():
        torch.testing.assert_close(ours[key], gradient, atol=1e-3, rtol=1e-4, msg=key)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["gpt3", "gated", "shared"])
def test_the_blocks_of_cuda_show_the_same_keys(name, monkeypatch):
    """Compiled only on CUDA; here its formula runs as written."""

    def build_blocks(offsets_BT, window, **_):
        return Mask(blocks=attention._blocks(offsets_BT.clamp(max=window - 1) if window else offsets_BT))

    model = build(name)
    expected = model.hidden_states(INPUTS, offsets_BT=OFFSETS)
    monkeypatch.setattr(transformer, "build_document_mask", build_blocks)
    torch.testing.assert_close(model.hidden_states(INPUTS, offsets_BT=OFFSETS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["documents alone", "hidden scores"])
def test_under_autocast_the_loss_stays_near(way, monkeypatch):
    model = build("gated").train()
    exact = masked(copy.deepcopy(model).double()).item()
    if way == "hidden scores":
        hide_scores(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked(model).item() == pytest.approx(exact, rel=2e-3)


def test_losses_of_single_targets_are_inside_documents_too():
    model = build("llama")
    assert target_losses(model, INPUTS, TARGETS, OFFSETS).sum().item() == pytest.approx(one_by_one(model).item())


def test_offsets_count_from_the_separator():
    tokens = torch.tensor([[3, 4, 0, 5, 6, 0, 0, 7], [0, 1, 1, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert offsets_in_documents(tokens, 0).tolist() == expected


def test_learned_positions_begin_anew_in_each_document():
    """The loss of a document does not depend on where in its row it lies, nor on the end of the table."""
    model = Transformer(replace(SHAPES["gpt2"], max_seq_len=40)).eval()
    document = torch.tensor([SEPARATOR, 5, 6, 7, 8])
    row = torch.cat([torch.full((35,), 9), document])[None]
    alone = model(document[None])[0]
    found = model.head(model.hidden_states(row, offsets_BT=offsets_in_documents(row, SEPARATOR)))[0, 35:]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
