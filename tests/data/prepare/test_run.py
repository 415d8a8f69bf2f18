"""Preparing a data folder: what is in it, which documents are for validation, and what is never destroyed."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lightlm.data.folder import DataFolder
from lightlm.data.prepare import run as module
from lightlm.data.prepare.run import Progress, prepare
from lightlm.data.readers import texts as sizes
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import DataError, UsageError
from tests.data.prepare.splitter import expected_split, tokens_of

DOCUMENTS = [f"Story {n}: the fox met {n * 7} geese, and <|endoftext|> nobody was harmed.\n" for n in range(60)]


def write_source(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_source(tmp_path / "stories.jsonl", DOCUMENTS)


def documents_of(folder: Path, split: str) -> list[str]:
    opened = DataFolder.open(folder)
    return [opened.tokenizer.decode(ids) for ids in opened.split(split).documents()]


def test_every_document_is_in_one_split_whole_and_ended(tmp_path: Path, source: str) -> None:
    manifest = prepare(source, "train:300", tmp_path / "out", val_fraction=0.2, shard_tokens=64)
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert 2 <= len(val) <= 25
    assert manifest.documents("train") == len(train)
    assert manifest.documents("val") == len(val)
    assert manifest.text_bytes == {"train": len("".join(train).encode()), "val": len("".join(val).encode())}
    assert all(shard.tokens == 64 for shard in manifest.shards if shard.file < "train_000005.bin")
    stream = DataFolder.open(tmp_path / "out").split("train")
    assert stream.slice(len(stream) - 1, 1).tolist() == [manifest.end_of_text_id]
    assert DataFolder.open(tmp_path / "out").verify() == manifest


def test_the_split_does_not_depend_on_order_or_company(tmp_path: Path, source: str) -> None:
    prepare(source, "train:300", tmp_path / "one", val_fraction=0.2)
    shuffled = write_source(tmp_path / "shuffled.jsonl", [*DOCUMENTS[::-1], "Another document."])
    prepare(shuffled, str(tmp_path / "one"), tmp_path / "two", val_fraction=0.2)
    old, new = (set(documents_of(tmp_path / name, "val")) for name in ("one", "two"))
    assert old <= new <= old | {"Another document."}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("shard_tokens", [64, 100_000])
def test_without_a_chosen_document_validation_gets_the_tail(
    number: int, workers: int, shard_tokens: int, tmp_path: Path
) -> None:
    documents = ["".join(f"Line {n} of document {d}.\n" for n in range(100)) for d in range(number)]
    documents *= 40 if number == 5 else 1  # then the tail begins with a document
    source = write_source(tmp_path / "source.jsonl", documents)
    out = tmp_path / "out"
    manifest = prepare(source, "train:300", out, val_fraction=1e-9, workers=workers, shard_tokens=shard_tokens)
    assert DataFolder.open(out).verify() == manifest
    folder = DataFolder.open(out)
    tokens = expected_split(documents, 1e-9, folder.tokenizer)
    assert tokens_of(folder) == tokens
    tail = min(1024, math.ceil((sum(map(len, tokens.values())) - 1) / 10))
    assert tail / 2 <= len(tokens["val"]) <= tail
    train, val = documents_of(out, "train"), documents_of(out, "val")
    assert "".join(train + val) == "".join(documents)
    assert manifest.text_bytes == {"train": len("".join(train)), "val": len("".join(val))}
    assert (manifest.documents("train"), manifest.documents("val")) == (len(train), len(val))
    for split in ("train", "val"):
        assert all(s.tokens == shard_tokens for s in [s for s in manifest.shards if s.split == split][:-1])
    counts = Counter(tokens["train"])
    total = len(tokens["train"]) + manifest.vocab_size
    nats = np.mean([-math.log((counts[t] + 1) / total) for t in tokens["val"]])
    assert manifest.unigram is not None
    assert manifest.unigram.nats_per_token == pytest.approx(nats)


def test_the_smallest_corpora_have_both_splits(tmp_path: Path) -> None:
    for number, documents in enumerate((["a"], ["a b"], ["a", "b"])):
        source = write_source(tmp_path / f"{number}.jsonl", documents)
        manifest = prepare(source, "train:300", tmp_path / f"out{number}", val_fraction=0.005)
        assert manifest.tokens("train")
        assert manifest.tokens("val")


def test_blank_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    source = write_source(tmp_path / "s.jsonl", ["", "one text", " \n\t", "another text"])
    manifest = prepare(source, "train:300", tmp_path / "out", val_fraction=0)
    assert manifest.skipped_documents == 2
    assert manifest.documents("train") + manifest.documents("val") == 2


def test_max_tokens_stops_after_the_document_that_reaches_it(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "CHUNK_DOCUMENTS", 7)
    prepare(source, "train:300", tmp_path / "all", val_fraction=0.2)
    lengths = [len(ids) + 1 for ids in DataFolder.open(tmp_path / "all").tokenizer.encode_batch(DOCUMENTS)]
    limit = sum(lengths[:10])
    for max_tokens, expected in [(limit, 10), (limit + 1, 11), (1, 1)]:
        out = tmp_path / f"limited{max_tokens}"
        manifest = prepare(source, str(tmp_path / "all"), out, val_fraction=0.2, max_tokens=max_tokens)
        found = [text for split in ("train", "val") for text in documents_of(out, split)]
        assert sorted("".join(sorted(found))) == sorted("".join(DOCUMENTS[:expected]))
        if expected > 1:
            assert manifest.tokens("train") + manifest.tokens("val") == sum(lengths[:expected])


def test_empty_sources_and_empty_train_splits_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match=r"holds no text \(1 blank"):
        prepare(write_source(tmp_path / "blank.jsonl", [" "]), "train:300", tmp_path / "out")
    with pytest.raises(DataError, match="holds no text"):
        prepare(write_source(tmp_path / "none.jsonl", []), "train:300", tmp_path / "out")
    with pytest.raises(DataError, match="smaller fraction"):
        prepare(source, "train:300", tmp_path / "out", val_fraction=0.999999)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank.jsonl", "none.jsonl", "stories.jsonl"]


@pytest.mark.parametrize(
    "wrong", [{"val_fraction": 1.0}, {"val_fraction": -0.1}, {"max_tokens": 0}, {"workers": 0}, {"shard_tokens": 0}]
)
def test_arguments_out_of_range_are_usage_errors(tmp_path: Path, source: str, wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        prepare(source, "train:300", tmp_path / "out", **wrong)  # type: ignore[arg-type]


def test_a_finished_folder_is_recognized_and_left_alone(tmp_path: Path, source: str) -> None:
    first = prepare(source, "train:300", tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = prepare(source, "train:300", tmp_path / "out")
    assert again.already_prepared
    assert not first.already_prepared
    assert again.shards == first.shards
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_settings_are_refused_naming_them_unless_overwritten(tmp_path: Path, source: str) -> None:
    prepare(source, "train:300", tmp_path / "out")
    with pytest.raises(DataError, match=r"val_fraction: 0\.005 there, 0\.3 now.*--overwrite"):
        prepare(source, "train:300", tmp_path / "out", val_fraction=0.3)
    write_source(tmp_path / "stories.jsonl", DOCUMENTS[:30])
    with pytest.raises(DataError, match="content: "):
        prepare(source, "train:300", tmp_path / "out")
    manifest = prepare(source, "train:300", tmp_path / "out", overwrite=True)
    assert manifest.documents("train") + manifest.documents("val") == 30


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, source: str) -> None:
    prepare(source, "train:300", tmp_path / "out")
    before = DataFolder.open(tmp_path / "out").verify()
    with (tmp_path / "stories.jsonl").open("a", encoding="utf-8") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match="line 61: not valid JSON"):
        prepare(source, str(tmp_path / "out"), tmp_path / "out", overwrite=True)
    assert DataFolder.open(tmp_path / "out").verify() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.jsonl"]


def test_foreign_files_are_never_replaced(tmp_path: Path, source: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"thesis\.txt"):
            prepare(source, "train:300", tmp_path / "mine", overwrite=overwrite)
    prepare(source, "train:300", tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match=r"notes\.md"):
        prepare(source, "train:300", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.md").read_text(encoding="utf-8") == "precious"


def test_an_empty_folder_may_be_filled(tmp_path: Path, source: str) -> None:
    (tmp_path / "out").mkdir()
    assert prepare(source, "train:300", tmp_path / "out").documents("train") == 55


def test_the_working_directory_is_not_replaced(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (out := tmp_path / "out").mkdir()
    monkeypatch.chdir(out)
    with pytest.raises(UsageError, match="out is or holds the working directory"):
        prepare(source, "train:300", ".")
    monkeypatch.chdir(tmp_path)
    prepare(source, "train:300", out)
    monkeypatch.chdir(out)
    with pytest.raises(UsageError, match="out is or holds the working directory"):
        prepare(source, "train:300", ".", overwrite=True)
    assert prepare(source, "train:300", ".").already_prepared  # nothing is replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.jsonl"]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini"])
def test_what_a_file_manager_leaves_in_a_folder_is_replaced(tmp_path: Path, source: str, name: str) -> None:
    (out := tmp_path / "out").mkdir()
    (out / name).touch()  # a folder with nothing else counts as empty
    prepare(source, "train:300", out)
    (out / name).touch()
    assert not prepare(source, "train:300", out, overwrite=True).already_prepared


def test_vocabularies_past_65536_are_written_as_uint32(tmp_path: Path, source: str) -> None:
    definition = train_tokenizer(DOCUMENTS, 300)
    definition.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {f"filler{n}": n for n in range(definition.vocab_size, 70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    manifest = prepare(source, str(tmp_path / "tokenizer.json"), tmp_path / "out")
    assert manifest.vocab_size == 70_000
    assert (tmp_path / "out" / "train_000000.bin").stat().st_size == 1024 + 4 * manifest.tokens("train")
    assert DOCUMENTS[0] in documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")


def test_progress_counts_up_to_the_whole(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "CHUNK_DOCUMENTS", 13)
    reports: list[Progress] = []
    manifest = prepare(source, "train:300", tmp_path / "out", progress=reports.append)
    tokenizing = [report for report in reports if report.phase == module.TOKENIZING]
    assert [report.documents for report in tokenizing] == [13, 26, 39, 52, 60]
    assert tokenizing[-1].tokens == manifest.tokens("train") + manifest.tokens("val")


def test_unigram_entropy_is_the_cross_entropy_of_the_counts(tmp_path: Path, source: str) -> None:
    manifest = prepare(source, "train:300", tmp_path / "out", val_fraction=0.2)
    folder = DataFolder.open(tmp_path / "out")
    train, val = (folder.split(name).slice(0, len(folder.split(name))).tolist() for name in ("train", "val"))
    counts = Counter(train)
    nats = [-math.log((counts[t] + 1) / (len(train) + manifest.vocab_size)) for t in val]
    text_nats = sum(nat for nat, token in zip(nats, val, strict=True) if token != folder.tokenizer.end_of_text_id)
    per_byte = text_nats / math.log(2) / manifest.text_bytes["val"]
    assert manifest.unigram is not None
    assert manifest.unigram.nats_per_token == pytest.approx(np.mean(nats))
    assert manifest.unigram.bits_per_byte == pytest.approx(per_byte)


def test_a_folder_made_before_a_setting_existed_is_recognized(tmp_path: Path, source: str) -> None:
    """A later setting is None, or absent, at its default; fields that came later have defaults."""
    prepare(source, "train:300", tmp_path / "out", val_fraction=0.2)
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["settings"]["max_tokens"], content["dropped"], content["bad"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert prepare(source, "train:300", tmp_path / "out", val_fraction=0.2).already_prepared
    with pytest.raises(DataError, match="max_tokens: None there, 500 now"):
        prepare(source, "train:300", tmp_path / "out", val_fraction=0.2, max_tokens=500)


def test_beginnings_of_few_documents_are_shown_once(tmp_path: Path) -> None:
    source = write_source(tmp_path / "s.jsonl", ["a long document of many words " * 20, "x", "another one"])
    prepare(source, "train:300", tmp_path / "out", val_fraction=0)
    shown = DataFolder.open(tmp_path / "out").beginnings(12)
    assert len(shown) == len(set(shown)) == 3


def test_what_follows_max_tokens_is_not_read(tmp_path: Path) -> None:
    path = Path(write_source(tmp_path / "s.jsonl", DOCUMENTS))
    prepare(str(path), "train:300", tmp_path / "all")
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n" + '{"text": "words"}\n' * 50_000)
    made = prepare(str(path), str(tmp_path / "all"), tmp_path / "out", max_tokens=20)
    assert 20 <= made.tokens("train") + made.tokens("val") < 400
