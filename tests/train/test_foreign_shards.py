"""Shards built by hand to llm.c's definition train as they are; ours open by that definition."""

import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from lightlm.data.folder import DataFolder
from lightlm.errors import DataError
from tests.cli.runner import Runner
from tests.train.watch import start


def write_by_hand(path: Path, tokens: list[int]) -> None:
    """llm.c, dev/data/data_common.py: 256 int32, of which magic, version and count are used, then uint16 tokens."""
    path.write_bytes(
        struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)
    )


def read_by_hand(path: Path) -> list[int]:
    raw = path.read_bytes()
    magic, version, count, *rest = struct.unpack("<256i", raw[:1024])
    assert (magic, version, set(rest)) == (20240520, 1, {0})
    assert len(raw) == 1024 + 2 * count
    return list(struct.unpack(f"<{count}H", raw[1024:]))


@pytest.fixture
def by_hand(workspace: Path, tmp_path: Path) -> Path:
    """The documents of data/tiny as llm.c would have written them: the end-of-text token opens each document."""
    folder = tmp_path / "data" / "llmc"
    folder.mkdir(parents=True)
    end = DataFolder.open(workspace / "data" / "tiny").manifest.end_of_text_id
    for split in ("train", "val"):
        ours = read_by_hand(workspace / "data" / "tiny" / f"{split}_000000.bin")
        assert ours[-1] == end
        tokens = [end, *ours[:-1]]
        write_by_hand(folder / f"stories_{split}_000000.bin", tokens[:1_000])
        write_by_hand(folder / f"stories_{split}_000001.bin", tokens[1_000:])
    shutil.copy(workspace / "data" / "tiny" / "tokenizer.json", folder)
    shutil.copy(workspace / "tiny.yaml", tmp_path)
    return folder


def test_shards_built_by_hand_train(by_hand: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(by_hand.parent.parent)
    result, watch = start("tiny.yaml", "data.dataset=llmc", "train.tokens=2560", name="llmc")
    assert result.step == 10
    assert watch.metrics[0]["loss"] == pytest.approx(math.log(320), rel=0.03)
    assert watch.metrics[-1]["val_loss"] < watch.metrics[0]["loss"] - 0.5
    assert watch.metrics[-1]["val_bpb"] > 0


def test_the_command_takes_shards_without_a_manifest(
    by_hand: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(by_hand.parent.parent)
    outcome = Runner(monkeypatch, capsys)("train", "tiny.yaml", "data.dataset=llmc", "train.tokens=512")
    assert outcome.code == 0, outcome.stderr


def test_the_documents_are_those_of_the_folder_they_came_from(by_hand: Path, workspace: Path) -> None:
    ours, theirs = DataFolder.open(workspace / "data" / "tiny"), DataFolder.open(by_hand)
    for split in ("train", "val"):
        pairs = zip(ours.split(split).documents(), theirs.split(split).documents(), strict=True)
        assert all(np.array_equal(first, second) for first, second in pairs)


def test_what_does_not_fit_is_named(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        DataFolder.open(by_hand).verify()
    write_by_hand(by_hand / "stories_train_000002.bin", [7, 400])
    with pytest.raises(DataError, match=r"train_000002\.bin: holds the token id 400, but the tokenizer has 320"):
        DataFolder.open(by_hand)
    (by_hand / "tokenizer.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(DataError, match=r"no tokenizer\.json, so its shards need GPT-2's"):
        DataFolder.open(by_hand)
    with (by_hand / "stories_train_000002.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match="truncated or damaged"):
        DataFolder.open(by_hand)
