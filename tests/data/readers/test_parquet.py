"""Parquet files: footers are parsed once, large cells are refused, and Arrow gives memory back."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from lightlm.data.chat.conversation import columns_of
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import parquet as parquet_reader
from lightlm.data.readers.texts import Omitted
from lightlm.data.select.filters import Filter
from lightlm.data.sources.registry import open_source
from lightlm.errors import DataError
from tests.corpus import read_unit
from tests.data.sources.test_local import write_parquet


def read(path: Path, row_filter: Filter | None = None) -> list[str]:
    return [text for unit in open_source(str(path), "text", row_filter).units() for text in read_unit(unit)]


@pytest.mark.parametrize("row_filter", [None, Filter("score >= 40")], ids=["all", "filtered"])
def test_a_footer_is_parsed_once_however_many_row_groups(
    row_filter: Filter | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pyarrow.table({"text": [f"document {n}" for n in range(50)], "score": range(50)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    parsed: list[object] = []
    real = parquet.read_metadata
    monkeypatch.setattr(parquet, "read_metadata", lambda source: parsed.append(source) or real(source))
    assert read(tmp_path / "a.parquet", row_filter) == [f"document {n}" for n in range(40 if row_filter else 0, 50)]
    assert len(parsed) == 1


def test_a_file_that_is_written_again_has_another_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one", "two"])
    assert read(path) == ["one", "two"]
    write_parquet(path, ["three"])
    os.utime(path, ns=(1, 1))
    assert read(path) == ["three"]


def test_arrow_gives_freed_memory_back_unless_told_otherwise() -> None:
    """Half of a text of 500 MB more, measured; too large to do it here."""
    code = "import lightlm.data.readers.registry, pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    environment = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    for pool in ({}, {"ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | pool, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == pool.get("ARROW_DEFAULT_MEMORY_POOL", "system")


def test_a_cell_above_the_limit_is_refused_by_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "RECORD_BYTES", 100)
    documents = ["a", "b" * 100, "c" * 101, None, "é" * 51, "f"]
    table = pyarrow.table({"text": documents, "score": range(6)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=6)
    with pytest.raises(DataError, match=r"a\.parquet, row group 0, row 2.* MB of text.*\.txt.*--skip-bad"):
        read(tmp_path / "a.parquet")
    bad: list[str] = []

    def collect(error: DataError) -> None:
        if not isinstance(error, Omitted):  # the null
            bad.append(str(error))

    (unit,) = open_source(str(tmp_path / "a.parquet")).units()
    found = [text for texts in unit.texts(collect) for text in texts.array.to_pylist()]
    assert found == ["a", "b" * 100, "f"]
    assert [message.partition(":")[0].rpartition("row ")[2].split()[0] for message in bad] == ["2", "4"]
    assert read(tmp_path / "a.parquet", Filter("score not in [2, 4]")) == ["a", "b" * 100, "f"]
    with pytest.raises(DataError, match="row 4"):
        read(tmp_path / "a.parquet", Filter("score > 3"))


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["é", None, "b"], pyarrow.large_string()),
        pyarrow.array(["é", None, "b"], pyarrow.string_view()),
        pyarrow.array(["é".encode(), None, b"b"], pyarrow.binary()),
        pyarrow.array(["é".encode(), None, b"b"], pyarrow.large_binary()),
        pyarrow.array(["é".encode(), None, b"b"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_every_type_of_text_is_read_and_nulls_are_counted(column: pyarrow.Array, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["é", "b"]
    left_out: list[DataError] = []
    (unit,) = open_source(str(tmp_path / "a.parquet")).units()
    list(unit.texts(left_out.append))
    assert [(each.cause, each.records) for each in left_out if isinstance(each, Omitted)] == [("null", 1)]


def test_a_column_of_nulls_is_rows_without_text(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["words " * 20] * 20}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "b.parquet")
    made = prepare(str(tmp_path), "train:300", tmp_path / "out")
    assert made.dropped == {"null": 3}


def test_bytes_that_are_not_utf8_and_lists_are_named(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [b"\xff"], "list": [["a"]], "doc": [{"body": "x"}], "doc.title": ["dots"]})
    parquet.write_table(table, tmp_path / "a.parquet")

    def column(name: str) -> list[str]:
        return [text for unit in open_source(str(tmp_path / "a.parquet"), name).units() for text in read_unit(unit)]

    assert column("doc.body") == ["x"]
    assert column("doc.title") == ["dots"]
    with pytest.raises(DataError, match="not UTF-8"):
        column("text")
    with pytest.raises(DataError, match="'list' holds list"):
        column("list")
    with pytest.raises(DataError, match=r"'doc' holds struct.*for example doc\.body"):
        column("doc")
    with pytest.raises(DataError, match=r"there are: text, list, doc\.body, doc\.title"):
        column("absent")


def _broken(values: list[bytes]) -> pyarrow.Array:
    """Text that is not checked to be UTF-8, as some writers leave it."""
    checked = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), checked.buffers())


@pytest.mark.parametrize(
    "kind", ["binary", "binary_view", "fixed", "string", "string_view", "dictionary", "conversations"]
)
def test_skip_bad_leaves_out_single_rows_that_are_not_utf8(kind: str, tmp_path: Path) -> None:
    values = [b"%03d" % number for number in range(60)]
    values[25] = b"\xff\xfe!"
    column = _broken(values)
    if kind in ("binary", "binary_view"):
        column = pyarrow.array(values, pyarrow.binary()).cast(getattr(pyarrow, kind)())
    elif kind == "fixed":
        column = pyarrow.array(values, pyarrow.binary(3))
    elif kind == "string_view":
        column = column.cast(pyarrow.string_view())
    elif kind == "dictionary":
        column = column.dictionary_encode()
    chat = kind == "conversations"
    table = pyarrow.table({"prompt": column, "completion": ["yes"] * 60} if chat else {"text": column})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    bad: list[str] = []
    found: list[str] = []
    source = open_source(str(tmp_path / "a.parquet"), columns_of("prompt", "text", "assistant") if chat else "text")
    for unit in source.units():
        for texts in unit.texts(lambda error: bad.append(str(error))):
            found += texts.array.to_pylist()
    wanted = [value.decode() for number, value in enumerate(values) if number != 25]
    assert [re.sub("[^0-9]", "", text) for text in found] == wanted
    assert bad == [f"{tmp_path / 'a.parquet'}, row group 1, row 5 of it: not UTF-8: byte 0xff at 0 of its text"]
