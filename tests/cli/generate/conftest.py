"""A folder with a run `demo`, which continues texts, and a model `talker`, which has a chat template."""

from pathlib import Path

import pytest

from lightlm.checkpoint import LoadedModel, save_model
from tests.evaluate.tiny_run import tiny_model, write_world
from tests.generate.test_prompts import CHATML
from tests.generate.tokenizers_at_hand import tokenizer_of


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    save_model(folder / "talker", talker().model, talker().tokenizer)
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def talker() -> LoadedModel:
    suggested = {"temperature": 0.6, "top_k": 20, "do_sample": True}
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    tokenizer = tokenizer_of("metaspace", "<s>").used_as(None, False, settings, suggested)
    return LoadedModel(tiny_model(tokenizer, max_seq_len=96), tokenizer, Path("talker"))
