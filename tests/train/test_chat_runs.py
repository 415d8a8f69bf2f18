"""Runs on conversations: what a run starts from, what its checkpoints say, and samples as chats."""

import json
from pathlib import Path

import pyarrow
import pytest
import torch

from lightlm import checkpoint
from lightlm.data.chat.conversation import ChatColumns, as_text
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.blocks import HASHES, split_hashes
from lightlm.data.prepare.run import prepare
from lightlm.errors import RecipeError
from lightlm.generate.prompts import encode_chat
from lightlm.recipe import load_recipe
from lightlm.runs import RUNS
from lightlm.train.initial import grown
from lightlm.train.setup import open_data, set_up
from lightlm.train.trainer import Trainer
from tests.train.watch import Recorder, empty_run, start

CHAT = ("data.dataset=answers", "data.document_mask=true", "train.tokens=512", "eval.every=512", "eval.prompts=[Hi]")


@pytest.fixture(scope="module")
def talk(workspace):
    """A folder of conversations with the tokenizer of a run, which lacks ChatML's tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        start("tiny.yaml", "train.tokens=256", "eval.prompts=[]", name="chat-base")
        lines = [{"prompt": f"Say {n}", "completion": f"The old clock says {n}."} for n in range(200)]
        Path("talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        prepare("talk.jsonl", "chat-base", "data/answers", text_column=ChatColumns("chat"), val_fraction=0.1)
        return workspace


@pytest.fixture(autouse=True)
def _in_workspace(talk, monkeypatch):
    monkeypatch.chdir(talk)


def test_a_run_grows_the_model_that_it_starts_from():
    from lightlm.convert.load import find_start

    recipe = load_recipe("tiny.yaml", [*CHAT, "model={}", "train.init_from=chat-base"], find_start=find_start)
    notes = []
    setup = set_up(recipe, open_data(recipe), notes.append)
    base = checkpoint.load_model(checkpoint.newest_checkpoint(RUNS / "chat-base"))
    before, size = base.model.state_dict(), base.tokenizer.vocab_size
    assert setup.recipe.model.vocab_size == size + 2
    assert any("2 more rows in its embedding, for <|im_start|> <|im_end|>" in note for note in notes)
    for name, weight in setup.model.state_dict().items():
        assert torch.equal(weight[: len(before[name])], before[name])
    table = setup.model.embed_tokens.weight
    assert (table[size:] - table[:size].mean(0)).abs().max() < table[:size].std()
    assert not torch.equal(table[-1], table[-2])
    again = grown(before, size + 2, recipe.train.seed)["embed_tokens.weight"]
    assert torch.equal(again, table)  # the same in every process


def for_validation(line):
    text = as_text([{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}])
    return split_hashes(pyarrow.array([text], pyarrow.large_string()))[0] < 0.1 * HASHES


def test_validation_with_nothing_to_predict_is_said_at_the_start():
    """Conversations whose first answer begins after the sequences end."""
    short = [{"prompt": f"Say {n}", "completion": f"It says {n}."} for n in range(100)]
    long = [{"prompt": f"{n} the old clock " * 40, "completion": "Yes."} for n in range(100)]
    lines = [*(line for line in short if not for_validation(line)), *(line for line in long if for_validation(line))]
    Path("long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare("long.jsonl", "chat-base", "data/long", text_column=ChatColumns("prompt"), val_fraction=0.1)
    assert len(DataFolder.open(Path("data/long")).split("val"))
    given, watch = [*CHAT[1:], "data.dataset=long"], Recorder()
    recipe = load_recipe("tiny.yaml", given)
    setup = set_up(recipe, open_data(recipe), watch.note)
    assert any("data/long has nothing to predict in sequences of 32 in its validation" in note for note in watch.notes)
    stopped_early = load_recipe("tiny.yaml", [*given, "train.patience=3"])
    with pytest.raises(RecipeError, match="no validation split with something to predict"):
        set_up(stopped_early, open_data(stopped_early), watch.note)
    assert Trainer(setup, empty_run("nothing-to-predict"), watch).train().val_loss is None


def test_the_shipped_recipe_trains_a_run():
    from lightlm.convert.load import find_start

    here = ["train.init_from=chat-base", "data.dataset=answers", "train.seq_len=32", "train.device=cpu"]
    small = ["train.tokens=2560", "train.batch_tokens=256", "train.dtype=float32", "eval.every=2560", "eval.tokens=512"]
    watch = Recorder()
    recipe = load_recipe("chat", [*here, *small], find_start=find_start)
    Trainer(set_up(recipe, open_data(recipe), watch.note), empty_run("shipped-chat"), watch).train()
    losses = [metrics["val_loss"] for metrics in watch.metrics if "val_loss" in metrics]
    assert losses[-1] < losses[0]
    assert watch.samples[0][1] == "user: Name a color\nassistant: "


def test_checkpoints_hold_the_template_and_every_end():
    recipe = load_recipe("tiny.yaml", CHAT)
    watch = Recorder()
    setup = set_up(recipe, open_data(recipe), watch.note)
    Trainer(setup, empty_run("answers"), watch).train()
    [(_, shown, _)] = watch.samples
    assert shown == "user: Hi\nassistant: "
    assert (RUNS / "answers" / "samples" / "step_000002.txt").read_text(encoding="utf-8").startswith(shown)
    tokenizer = checkpoint.load_model(checkpoint.newest_checkpoint(RUNS / "answers")).tokenizer
    assert tokenizer.end_ids == {tokenizer.end_of_text_id, tokenizer.id_of("<|im_end|>")}
    text, ids = encode_chat(tokenizer, [{"role": "user", "content": "Say 7"}])
    assert text == "<|im_start|>user\nSay 7<|im_end|>\n<|im_start|>assistant\n"
    # The model reads the prompt's tokens as it was trained on them.
    documents = [document.tolist() for document in DataFolder.open("data/answers").split("train").documents()]
    assert any(document[: len(ids)] == ids for document in documents)


def test_text_with_the_same_tokenizer_can_be_mixed_in():
    prepare("tiny.jsonl", "data/answers", "data/tiny-chat", val_fraction=0.1)
    recipe = load_recipe("tiny.yaml", [*CHAT[1:], "data.mix={tiny-chat: 0.5, answers: 0.5}"])
    setup = set_up(recipe, open_data(recipe), lambda note: None)
    assert "chat_template" in setup.tokenizer.settings
    assert list(setup.loader.packings) == ["answers"]
