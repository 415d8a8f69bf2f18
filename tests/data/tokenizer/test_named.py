"""Which tokenizer a name means: trained, of a run, in a folder, on the Hub; and the errors."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from lightlm.data.sources.hub import client
from lightlm.data.sources.hub.client import download_tokenizer
from lightlm.data.tokenizer import load_tokenizer, train_tokenizer
from lightlm.data.tokenizer.named import requested_vocab_size
from lightlm.errors import DataError, UsageError

TEXTS = ["one two one two. " * 4]
TRAINED = train_tokenizer(TEXTS, 320)


@pytest.mark.parametrize("spec", ["train:abc", "train:", "train", "train:-5", "train:1.5", "train:100"])
def test_malformed_training_requests_are_usage_errors(spec: str) -> None:
    with pytest.raises(UsageError, match=spec):
        requested_vocab_size(spec)


def test_training_requests_are_told_from_names() -> None:
    assert requested_vocab_size("train:8192") == 8192
    assert requested_vocab_size("gpt2") is None


def test_loading_what_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"There is no tokenizer .*absent\.json"):
        load_tokenizer(str(tmp_path / "absent.json"), download_tokenizer)
    with pytest.raises(DataError, match=r"has no tokenizer\.json, nor vocab\.json and merges\.txt"):
        load_tokenizer(str(tmp_path), download_tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path), download_tokenizer)


def test_a_hub_tokenizer_offline_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no-such-org/tokenizer.*HF_HUB_OFFLINE.*train:8192"):
        load_tokenizer("no-such-org/tokenizer", download_tokenizer)


def test_a_hub_tokenizer_that_another_program_fetched_in_part_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    known, asked = {"tokenizer.json": str(tmp_path / "tokenizer.json")}, []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: known.get(name))

    def download(repo: str, name: str) -> Path | None:
        asked.append(name)
        known[name] = object()  # which the cache says of files that a repository lacks
        return tmp_path / name if name == "tokenizer.json" else None

    monkeypatch.setattr(client, "_download_if_there", download)
    monkeypatch.setattr(client, "require_hub", Mock(side_effect=DataError("no connection")))
    assert download_tokenizer("someone/chat", "") == tmp_path
    assert "is read without" in caplog.text
    assert "tokenizer_config.json" in caplog.text
    assert not asked
    monkeypatch.setattr(client, "require_hub", lambda *_: None)
    assert download_tokenizer("someone/chat", "") == tmp_path
    assert {"tokenizer_config.json", "generation_config.json"} <= set(asked)
    known["tokenizer.json"] = str(tmp_path / "tokenizer.json")
    asked.clear()
    assert download_tokenizer("someone/chat", "") == tmp_path
    assert not asked, "all is known"


def test_the_tokenizer_of_a_run_is_its_newest_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step, tokenizer in ((1, train_tokenizer(TEXTS, 300)), (2, TRAINED)):
        folder = Path(f"runs/demo/checkpoints/step_{step:06d}")
        folder.mkdir(parents=True)
        tokenizer.save(folder / "tokenizer.json")
        (folder / "config.json").write_text(json.dumps({"end_of_text_id": 7}))
        (folder / "complete.json").touch()
    Path("runs/demo/recipe.yaml").touch()
    Path("runs/latest").symlink_to("demo")
    for spec in ("demo", "runs/demo", "runs/latest", "latest", "runs/demo/checkpoints/step_000002"):
        loaded = load_tokenizer(spec, download_tokenizer)
        assert (loaded.sha256, loaded.end_of_text_id) == (TRAINED.sha256, 7)
    Path("runs/fresh").mkdir()
    Path("runs/fresh/recipe.yaml").touch()
    with pytest.raises(DataError, match="runs/fresh has no checkpoint yet"):
        load_tokenizer("fresh", download_tokenizer)
