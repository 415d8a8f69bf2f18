"""Runs with `data.document_mask`: what they train on, that they resume exactly, and data without documents."""

import itertools

import pytest
import torch

from lightlm.data.folder import DataFolder
from lightlm.data.loader import validation_batches
from lightlm.data.prepare.run import prepare
from lightlm.errors import RecipeError
from lightlm.recipe import load_recipe
from lightlm.train.setup import open_data, set_up
from lightlm.train.step.loss import token_loss
from tests.train.watch import Recorder, comparable, resume, start

MASKED = ("tiny.yaml", "data.document_mask=true", "train.tokens=2560", "eval.every=1280", "eval.prompts=[]")


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def whole_run(workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return comparable(start(*MASKED, name="documents")[1].metrics)


@torch.no_grad()
def mean_loss(model, inputs, targets, separator):
    """Nats per target of documents run one by one."""
    total = 0.0
    for row, following in zip(inputs, targets, strict=True):
        starts = [0, *(i for i in range(1, len(row)) if row[i] == separator), len(row)]
        for begin, end in itertools.pairwise(starts):
            total += token_loss(model, row[None, begin:end], following[None, begin:end].contiguous()).item()
    return total / targets.numel()


def test_a_step_and_a_validation_see_one_document_at_a_time(whole_run):
    recipe = load_recipe(MASKED[0], MASKED[1:])
    data = open_data(recipe)
    setup = set_up(recipe, data, lambda message: None)
    end = data.tokenizer.end_of_text_id
    inputs, targets = setup.loader.batch(0, recipe.batch_sequences)
    assert (inputs[:, 1:] == end).any(), "no row holds two documents"
    assert whole_run[0]["loss"] == pytest.approx(mean_loss(setup.model, inputs, targets, end), rel=1e-5)
    stream = DataFolder.open("data/tiny").split("val")
    inputs, targets = next(validation_batches(stream, recipe.seq_len, recipe.eval.tokens, 100))
    with torch.no_grad():
        found = setup.loss.evaluate(inputs, targets).mean().item()
    assert found == pytest.approx(mean_loss(setup.model, inputs, targets, end), rel=1e-5)


def test_losses_do_not_depend_on_micro_batches(whole_run):
    for size in (1, 8):
        _, watch = start(*MASKED, f"train.micro_batch_size={size}", name=f"documents-{size}")
        losses = [row["loss"] for row in whole_run]
        assert [row["loss"] for row in watch.metrics] == pytest.approx(losses, rel=1e-4)


def test_an_interrupted_run_resumes_exactly(whole_run):
    stopped = Recorder(terminate_at=5)
    start(*MASKED, name="documents-stopped", watch=stopped)
    assert comparable(stopped.metrics + resume("documents-stopped")[1].metrics) == whole_run


def test_data_of_one_document_is_refused(tmp_path):
    (tmp_path / "book.txt").write_text("One long text. " * 400, encoding="utf-8")
    prepare(str(tmp_path / "book.txt"), "train:300", tmp_path / "book", val_fraction=0.1)
    recipe = load_recipe(MASKED[0], [*MASKED[1:], f"data.dataset={tmp_path / 'book'}"])
    with pytest.raises(RecipeError, match=r"data\.document_mask has no effect: nothing follows an end-of-text token"):
        set_up(recipe, open_data(recipe), lambda message: None)
