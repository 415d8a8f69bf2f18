"""Reading text: every kind of file, in a stable order, with errors that name the place."""

import gzip
import json
import pickle
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.readers import jsonl as readers
from lightlm.data.sources.base import Source
from lightlm.data.sources.hub import client as hub
from lightlm.data.sources.registry import open_source
from lightlm.errors import DataError
from tests.corpus import read_unit


def texts(source: Source) -> list[str]:
    return [text for unit in source.units() for text in read_unit(unit)]


def read(path: Path, column: str = "text") -> list[str]:
    return texts(open_source(str(path), column))


def json_lines(*documents: str, column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: text}) + "\n" for text in documents).encode()


def write_parquet(path: Path, documents: list[str | None], column: str = "text") -> None:
    parquet.write_table(pyarrow.table({"id": list(range(len(documents))), column: documents}), path, row_group_size=2)


def test_a_mixed_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(json_lines("two", "drei ☃"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json_lines("four")))
    compressor = zstandard.ZstdCompressor()
    frames = compressor.compress(json_lines("five")) + compressor.compress(json_lines("six"))
    (tmp_path / "d.jsonl.zst").write_bytes(frames)
    write_parquet(tmp_path / "e.parquet", ["seven", None, "eight", "nine", "ten"])
    (tmp_path / "sub" / "f.MD").write_text("# eleven", encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    (tmp_path / ".hidden.txt").write_text("no", encoding="utf-8")
    source = open_source(str(tmp_path))
    expected = ["one", "two", "drei ☃", "four", "five", "six", "seven", "eight", "nine", "ten", "# eleven"]
    assert texts(source) == expected
    ids = [unit.id for unit in source.units()]
    assert ids == [unit.id for unit in open_source(str(tmp_path)).units()]
    assert len(set(ids)) == len(ids) == 8  # three row groups
    assert [text for unit in pickle.loads(pickle.dumps(list(source.units()))) for text in read_unit(unit)] == expected


def test_the_default_name_leaves_the_suffixes_out(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl.gz").write_bytes(gzip.compress(json_lines("x")))
    assert open_source(str(tmp_path / "notes.jsonl.gz")).name == "notes"
    assert open_source(str(tmp_path)).name == tmp_path.name
    assert open_source("hf:org/corpus:small").name == "corpus-small"
    assert open_source("fineweb-edu").name == "fineweb-edu"


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    before = open_source(str(tmp_path)).fingerprint
    assert open_source(str(tmp_path)).fingerprint == before
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    assert open_source(str(tmp_path)).fingerprint != before


@given(documents=st.lists(st.text(max_size=30), max_size=20), block=st.integers(1, 200))
def test_blocks_of_a_jsonl_file_hold_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], block: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": d}, ensure_ascii=False).encode() + b"\n" for d in documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block)
        assert read(path) == documents


def test_text_files_lose_byte_order_marks_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(tmp_path / "a.txt") == ["one\ntwo\n"]


def test_half_a_surrogate_pair_in_json_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "a\ud83d b \ud83d\ude00"}' + b"\n" + rb'{"text": "c\ude00"}')
    first, second = read(tmp_path / "a.jsonl")
    assert first == "a� b 😀"
    assert second.encode() == "c�".encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\xff", r"a\.txt: not UTF-8: byte 0xff at offset 4"),
        ("a.jsonl", json_lines("x") + b"\n" + b'{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", json_lines("x") + b'{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1: a JSON object was expected"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: the column 'text' holds int, not text\. .*--text-column"),
        ("a.jsonl", json_lines("x", column="body"), r"a\.jsonl, line 1: no column 'text'; there are: id, body"),
        ("a.jsonl.gz", gzip.compress(json_lines("x", "y", column="z")), r"a\.jsonl\.gz, line 1: no column 'text'"),
        ("a.jsonl.gz", gzip.compress(json_lines(*map(str, range(999))))[:-20], r"a\.jsonl\.gz: damaged or truncated"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: damaged or truncated"),
        ("a.jsonl.zst", b"no zstandard", r"a\.jsonl\.zst: damaged or truncated"),
        ("a.jsonl.zst", zstandard.compress(json_lines(*map(str, range(999))))[:-3], r"damaged or truncated"),
        ("a.parquet", b"no parquet", r"a\.parquet: not a readable Parquet file"),
        ("a.pdf", b"%PDF", r"a\.pdf: this kind of file cannot be read; supported are \.txt"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "content"
    ),  # gzip writes the time into its bytes, and test names must be the same in every worker
)
def test_mistakes_in_files_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_mistakes_in_parquet_files_name_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x"] * 10, column="body")
    with pytest.raises(DataError, match=r"no column 'text'; there are: id, body\. .*--text-column"):
        read(path)
    with pytest.raises(DataError, match="'id' holds int64, not text"):
        read(path, "id")
    assert read(path, "body") == ["x"] * 10
    raw = bytearray(path.read_bytes())
    raw[4:120] = b"\xff" * 116  # the first pages; the footer stays whole
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet: row group 0 cannot be read"):
        read(path, "body")


def test_missing_paths_and_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*absent\.txt"):
        open_source(str(tmp_path / "absent.txt"))
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(DataError, match="no file in this folder can be read"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pydoc", r"Did you mean pydocs\?"),
        ("fineweb_edu", r"Did you mean fineweb-edu\?"),
        ("zzzz", "Known names: pydocs, .*fineweb-edu"),
        ("org/name", "Hub as hf:org/name"),
        ("hf:name", "hf:organization/name"),
        ("pydocs:3.12", "pydocs has no configurations"),
    ],
)
def test_unknown_names_get_a_suggestion(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(spec)


def test_an_unreachable_hub_is_one_message_that_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    hub._unreachable.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"fineweb-edu.*127\.0\.0\.1:9 cannot be reached.*lightlm prepare-data pydocs"):
        list(open_source("fineweb-edu").units())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        list(open_source("hf:org/name").units())


def test_a_folder_with_the_name_of_a_hub_data_set_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some-org/corpus").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has the name of this data set\. .* \./some-org/corpus"):
        list(open_source("hf:some-org/corpus").units())
