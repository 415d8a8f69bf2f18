"""CSV and TSV, held to Python's csv module, which writes them here."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import delimited
from lightlm.data.select.filters import Filter
from lightlm.data.sources.registry import open_source
from lightlm.errors import DataError
from tests.corpus import read_unit, texts
from tests.data.readers.test_text_files import read

CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def table(rows: list[list[str]], delimiter: str = ",", end: str = "\r\n") -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(rows)
    return out.getvalue().encode()


@settings(max_examples=30)
@given(
    cells=st.lists(st.tuples(CELLS, CELLS), max_size=8),
    form=st.sampled_from([(".csv", ","), (".csv", ";"), (".csv", "\t"), (".csv", "|"), (".tsv", "\t")]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_tables_round_trip(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], form: tuple[str, str], end: str
) -> None:
    suffix, delimiter = form
    path = tmp_path_factory.getbasetemp() / f"table{suffix}"
    rows = [["id", "text", "note"], *(["1", text, note] for text, note in cells)]
    path.write_bytes(table(rows, delimiter, end))
    assert read(path) == [text for text, _ in cells]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,body\n1,a\n", "line 1: no column 'text'; there are: id, body"),
        (b"id,text,text\n1,a,b\n", "two columns named 'text'"),
        (b"id,text\n1,a\n2,b,c\n", "line 3: 3 fields, but the first line names 2 columns.*quotes"),
        (b'id,text\n1,"a\n2,b\n', "line 2: not a row with the separator ',' .unexpected end"),
        ("id,text\n1,a\n2,caf\xe9\n".encode("latin-1"), "line 3: not UTF-8: byte 0xe9.*LATIN1"),
        ("id,text\n1,words and words\n".encode("utf-16-le"), "UTF-16LE without a byte-order mark"),
    ],
)
def test_mistakes_name_the_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
        read(tmp_path / "a.csv")


def test_skip_bad_leaves_out_single_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "RECORD_BYTES", 2_000)
    monkeypatch.setattr(delimited, "CHUNK_BYTES", 100)
    rows = [["text", "n"], *([text, "1"] for text in texts(20))]
    bad = b"too,many,fields\r\n" + b"caf\xe9,1\r\n" + b"a\0b,1\r\n" + b"a," + b"x" * 3_000 + b"\r\n"
    content = table(rows) + bad + table([["the last row", "1"]])
    (tmp_path / "a.csv").write_bytes(content)
    made = prepare(str(tmp_path / "a.csv"), "train:300", tmp_path / "out", skip_bad=True)
    assert made.dropped == {"unreadable": 4}
    assert [message.partition(":")[0].rpartition(" ")[2] for message in made.bad] == ["22", "23", "24", "25"]
    assert made.documents("train") + made.documents("val") == 21


def test_a_header_in_another_encoding_is_one_bad_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("id;texte;cat\xe9gorie\n1;a;b\n".encode("latin-1"))
    (tmp_path / "b.csv").write_text("text\nwords\n", encoding="utf-8")
    made = prepare(str(tmp_path / "*.csv"), "train:300", tmp_path / "out", skip_bad=True, val_fraction=0)
    assert made.dropped == {"unreadable": 1}
    assert r"there are: id, texte, cat\udce9gorie" in made.bad[0]


def test_conversations_as_a_spreadsheet_exports_them(tmp_path: Path) -> None:
    """With a byte-order mark, semicolons, line ends in cells, and empty rows below the table."""
    path = tmp_path / "a.csv"
    rows = 'Question;Answer\r\n"Red light.\r\nWhat now?";"Unplug it; wait."\r\n' + ";\r\n" * 300
    path.write_bytes(("\ufeff" + rows).encode())
    with pytest.raises(DataError, match=r"there are: Question, Answer\. Rename them"):
        prepare(str(path), "train:300", tmp_path / "out", text_column=ChatColumns("chat"))
    path.write_bytes(("\ufeff" + rows.replace("Question;Answer", "prompt;completion")).encode())
    made = prepare(str(path), "train:300", tmp_path / "out", text_column=ChatColumns("chat"), val_fraction=0)
    assert (made.documents("train"), made.dropped) == (1, {"null": 300})
    assert "Red light.\r\nWhat now?" in DataFolder.open(tmp_path / "out").beginnings(1)[0]


def test_filters_compare_fields_as_what_they_are_compared_with(tmp_path: Path) -> None:
    rows = [
        ["text", "score", "ok", "code"],
        ["a", "3.5", "true", "007"],
        ["b", "2", "False", "7"],
        ["c", "", "true", "007"],
    ]
    (tmp_path / "a.csv").write_bytes(table(rows))

    def kept(text: str) -> list[str]:
        source = open_source(str(tmp_path / "a.csv"), "text", Filter(text))
        return [text for unit in source.units() for text in read_unit(unit)]

    assert kept("score >= 2") == ["a", "b"]
    assert kept("ok == true and code == '007'") == ["a", "c"]
    assert kept("score is null") == ["c"]
    with pytest.raises(DataError, match=r"line 2: --filter .*no column 'x'"):
        kept("x > 1")


def test_a_line_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_bytes(table([["text"], ["x" * 200_000]]))  # above the csv module's own limit
    assert read(tmp_path / "a.csv") == ["x" * 200_000]
    monkeypatch.setattr(delimited, "RECORD_BYTES", 1_000)
    with pytest.raises(DataError, match="line 2: more than"):
        read(tmp_path / "a.csv")
