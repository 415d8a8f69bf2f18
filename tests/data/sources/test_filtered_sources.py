"""`--filter` and globs on files: which records are read and counted, and which row groups are not read."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from lightlm.data.prepare.run import prepare
from lightlm.data.readers import parquet as parquet_reader
from lightlm.data.readers import texts as packing
from lightlm.data.select.filters import Filter
from lightlm.data.sources.registry import open_source
from lightlm.errors import DataError
from tests.corpus import read_unit
from tests.hub import Hub

ROWS = [{"text": f"document {n}", "score": n % 5 if n % 7 else None, "meta": {"lang": "en"}} for n in range(40)]
ROW_FILTER = Filter("score >= 3 and meta.lang == 'en'")
KEPT = [row["text"] for row in ROWS if (row["score"] or 0) >= 3]


def write(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=11)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "b.jsonl").write_text(lines, encoding="utf-8")
    with pyarrow.CompressedOutputStream(str(folder / "c.jsonl.gz"), "gzip") as file:
        file.write(lines.encode())
    return [folder / "a.parquet", folder / "b.jsonl", folder / "c.jsonl.gz"]


def read(spec: Path | str, row_filter: Filter | None = None) -> list[str]:
    return [text for unit in open_source(str(spec), "text", row_filter).units() for text in read_unit(unit)]


@pytest.mark.parametrize("chunk", [1 << 20, 60])
def test_every_kind_of_file_is_filtered_alike(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (packing, parquet_reader):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    for path in write(tmp_path):
        assert read(path, ROW_FILTER) == KEPT
        assert read(path, Filter("text in ['document 3', 'document 9', 'x']")) == ["document 3", "document 9"]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "in")
    source = open_source(str(tmp_path / "in"), row_filter=ROW_FILTER)
    made = prepare(source, "train:300", tmp_path / "out", filter=ROW_FILTER)
    assert made.documents("train") + made.documents("val") == 3 * len(KEPT)
    assert made.dropped == {"filtered": 3 * (len(ROWS) - len(KEPT))}
    assert made.settings["filter"] == ROW_FILTER.text
    with pytest.raises(DataError, match=r"filter: score >= 3 .* there, None now"):
        prepare(str(tmp_path / "in"), "train:300", tmp_path / "out")


def test_a_key_that_a_json_record_lacks_is_null(tmp_path: Path) -> None:
    rows = [{"text": "a b", "lang": "en"}, {"text": "c d"}, {"text": "e f", "lang": "de"}]
    rows.append({"text": "g h", "lang": None})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read(path, Filter("lang == 'en'")) == ["a b"]
    assert read(path, Filter("lang is null")) == ["c d", "g h"]
    assert read(path, Filter("lang.code is null or lang != 'en'")) == [row["text"] for row in rows]
    row_filter = Filter("lang == 'en'")
    made = prepare(str(path), "train:300", tmp_path / "out", filter=row_filter, val_fraction=0.0, skip_bad=True)
    assert made.dropped == {"filtered": 2, "filtered without 'lang'": 1}
    made = prepare(str(path), "train:300", tmp_path / "kept", filter=Filter("lang is null"), val_fraction=0.0)
    assert (made.dropped, made.flagged) == ({"filtered": 2}, {"without 'lang'": 1})


def test_row_groups_without_a_match_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sorted.parquet"
    rows = [{"text": f"document {n}", "score": n // 10} for n in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10, compression="none")
    content = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content[start : start + 40] = b"\xff" * 40  # the first row group cannot be read any more
    path.write_bytes(content)
    with pytest.raises(DataError, match="row group 0 cannot be read"):
        read(path)
    assert read(path, Filter("score > 2")) == [row["text"] for row in rows[30:]]
    bad: list[DataError] = []
    assert (
        sum(
            len(t.array)
            for unit in open_source(str(path), row_filter=Filter("score > 8")).units()
            for t in unit.texts(bad.append)
        )
        == 0
    )
    assert sum(error.records for error in bad) == 40  # type: ignore[attr-defined]


def test_mistakes_name_the_columns(tmp_path: Path) -> None:
    for path in write(tmp_path / "in"):
        if path.suffix == ".parquet":
            with pytest.raises(DataError, match="no column 'scor'; there are: text, score, meta"):
                read(path, Filter("scor > 1"))
        else:
            with pytest.raises(DataError, match=r"holds no text \(40 filtered without 'scor' documents were"):
                prepare(str(path), "train:300", tmp_path / "out", filter=Filter("scor > 1"))
        with pytest.raises(DataError, match="the column 'score' holds"):
            read(path, Filter("score == 'a'"))
    (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
    with pytest.raises(DataError, match=r"notes\.txt is plain text"):
        open_source(str(tmp_path), row_filter=ROW_FILTER)
    with pytest.raises(DataError, match="pydocs has no columns"):
        open_source("pydocs", row_filter=ROW_FILTER)


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/2.txt", "x/1.txt", "x/deep/3.txt", "x/.hidden/4.txt", "x/other.csv", "y/5.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert read(tmp_path / "x" / "*.txt") == ["x/1.txt", "x/2.txt"]
    assert read(tmp_path / "x" / "**" / "*") == ["x/1.txt", "x/2.txt", "x/deep/3.txt"]
    assert read(tmp_path / "[xy]" / "[1-5].txt") == ["x/1.txt", "x/2.txt", "y/5.txt"]
    monkeypatch.chdir(tmp_path)
    assert read("*/5.txt") == ["y/5.txt"]
    source = open_source("x/*.txt")
    assert (source.name, source.spec) == ("x", str(tmp_path / "x" / "*.txt"))
    assert source.fingerprint != open_source("x").fingerprint
    with pytest.raises(DataError, match=r"other\.csv, line 1: no column 'text'; there are: x/other\.csv"):
        read("x/*.csv")
    with pytest.raises(DataError, match=r"x/\*\.pdf: no file that this pattern matches can be read"):
        open_source("x/*.pdf")
    (tmp_path / "odd [1].txt").write_text("a name with brackets", encoding="utf-8")
    assert read("odd [1].txt") == ["a name with brackets"]


def test_a_hub_data_set_is_filtered(hub: Hub, tmp_path: Path) -> None:
    for path in write(tmp_path / "corpus")[1:]:
        path.unlink()
    hub.add("some/corpus", tmp_path / "corpus")
    source = open_source("hf:some/corpus", row_filter=ROW_FILTER)
    made = prepare(source, "train:300", tmp_path / "out", filter=ROW_FILTER)
    assert made.documents("train") + made.documents("val") == len(KEPT)
    assert made.dropped == {"filtered": len(ROWS) - len(KEPT)}
