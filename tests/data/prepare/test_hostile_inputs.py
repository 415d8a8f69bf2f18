"""Sources, tokenizers and machines that are not as they should be: nothing is lost without a word."""

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from lightlm.data.prepare.encoders import Encoder
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import jsonl as readers
from lightlm.data.sources.stdin import standard_input
from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.errors import DataError, UsageError
from tests.corpus import read_unit, texts


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    train_tokenizer(texts(200), 500).save(tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def test_json_nested_too_deeply_is_a_bad_line(tmp_path: Path, tokenizer: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts(20))
    depth = 100_000
    with source.open("a") as file:
        file.write('{"text": "x", "more": ' + "[" * depth + "]" * depth + "}\n")
    with pytest.raises(DataError, match="line 21: not valid JSON"):
        prepare(str(source), tokenizer, tmp_path / "out")
    assert prepare(str(source), tokenizer, tmp_path / "out", skip_bad=True).dropped == {"unreadable": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's name is Unicode")
def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path, tokenizer: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    path = write_lines(folder / os.fsdecode(b"caf\xe9.jsonl"), texts(20))
    for source in (folder, path):
        with pytest.raises(DataError, match=r"caf.*not UTF-8.*[Rr]ename"):
            prepare(str(source), tokenizer, tmp_path / "out")


def test_a_dictionary_column_is_text_and_a_name_given_twice_is_refused(tmp_path: Path, tokenizer: str) -> None:
    column = pyarrow.array([*texts(20), None])
    manifests = []
    for name, values in {"plain": column, "dictionary": column.dictionary_encode()}.items():
        parquet.write_table(pyarrow.table({"text": values}), tmp_path / f"{name}.parquet")
        manifests.append(prepare(str(tmp_path / f"{name}.parquet"), tokenizer, tmp_path / name))
    assert manifests[0].shards == manifests[1].shards
    parquet.write_table(pyarrow.table([column, column], names=["text", "text"]), tmp_path / "two.parquet")
    with pytest.raises(DataError, match="two columns named 'text'"):
        prepare(str(tmp_path / "two.parquet"), tokenizer, tmp_path / "two")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_fault_of_the_machine_is_not_a_bad_record(
    suffix: str, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--skip-bad does not skip a file because there are too many open ones."""
    source = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts(20)}), source)
    else:
        write_lines(source, texts(20))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: fail() if self == source else real(self, *a, **k))
    monkeypatch.setattr(parquet, "ParquetFile", fail)
    with pytest.raises(DataError, match="Too many open files"):
        prepare(str(source), tokenizer, tmp_path / "out", skip_bad=True)


def test_lines_are_numbered_without_reading_the_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever blocks the file is read in: each is counted once, and never held whole."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 50)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 16)
    lines = [json.dumps({"text": "x" * (n * 7 % 90)}) if n % 3 else "bad" * (n % 20) for n in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n".join(lines) + "\n", encoding="utf-8")
    found: list[str] = []
    for unit in readers.jsonl_units(path, "a", "text", None):
        list(unit.texts(lambda error: found.append(str(error))))
    bad = [number for number, line in enumerate(lines, start=1) if line.startswith("bad")]
    assert [int(message.partition("line ")[2].partition(":")[0]) for message in found] == bad
    reads: list[int] = []
    real = Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        reads.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    for unit in readers.jsonl_units(path, "a", "text", None):
        list(unit.texts(lambda _: None))
    assert len(reads) == len(range(0, path.stat().st_size, 50)) + 1  # one to see that it holds lines


def word_tokenizer(path: Path) -> str:
    """One whose model has the end-of-text token among its words."""
    words = {"[UNK]": 0, "</s>": 1, "hello": 2, "world": 3}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[UNK]", "</s>"])
    made.save(str(path))
    return str(path)


@pytest.mark.parametrize("length", [1, 2_000])
def test_a_tokenizer_that_reads_its_end_of_text_token_in_a_text_is_refused(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightlm.data.readers import texts

    spec = word_tokenizer(tmp_path / "words.json")
    source = write_lines(tmp_path / "a.jsonl", ["hello world", "hello </s> world " * length])
    with pytest.raises(DataError, match=r"end-of-text token '</s>'.*--tokenizer"):
        prepare(str(source), spec, tmp_path / "out")
    # What the first look cannot know, the ids show.
    monkeypatch.setattr(
        "lightlm.data.prepare.run.choose_encoder", lambda _, path, end: (Encoder(Tokenizer.from_file(path)), None)
    )
    monkeypatch.setattr(texts, "LARGE_BYTES", 1_000)
    with pytest.raises(DataError, match=r"end-of-text token '</s>'.*a\.jsonl"):
        prepare(str(source), spec, tmp_path / "out", skip_bad=True)


def test_two_pipes_do_not_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    def read(source: Any) -> list[str]:
        return [text for unit in source.units() for text in read_unit(unit)]

    pipe(b'{"text": "first"}\n')
    with standard_input(tmp_path / "out", "text") as first:
        pipe(b'{"text": "second"}\n')
        with pytest.raises(DataError, match="Another"), standard_input(tmp_path / "out", "text"):
            pass
        assert read(first) == ["first"]
    assert list(tmp_path.iterdir()) == []
    pipe(b'{"text": "second"}\n')
    with standard_input(tmp_path / "out", "text") as second:
        assert read(second) == ["second"]


def test_a_pipe_onto_a_full_disk_is_a_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"disk .* is full"), standard_input(tmp_path / "out", "text"):
        pass


def test_the_root_folder_is_refused(tmp_path: Path, tokenizer: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts(20))
    with pytest.raises(UsageError, match="--out"):
        prepare(str(source), tokenizer, Path(tmp_path.anchor))


def test_messages_do_not_say_to_repeat_what_cannot_work(tmp_path: Path, tokenizer: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts(400))
    with source.open("a") as file:
        file.write("{\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", 20_000)
        patch.setattr("lightlm.data.prepare.blocks.BLOCK_BYTES", 20_000)
        with pytest.raises(DataError, match=r"\)\. .*--skip-bad\. Progress is saved\. Rerun "):
            prepare(str(source), tokenizer, tmp_path / "out", workers=1)
    with pytest.raises(DataError, match="unfinished preparation with other settings") as refused:
        prepare(str(source), tokenizer, tmp_path / "out", val_fraction=0.2)
    assert "Rerun" not in str(refused.value)
