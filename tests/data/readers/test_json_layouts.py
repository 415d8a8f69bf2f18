"""JSON that is not one record per line: arrays, several records per line, records over several lines."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.prepare.run import prepare
from lightlm.data.readers import json_values, jsonl
from lightlm.data.readers import texts as packing
from lightlm.data.readers.registry import reader_of
from lightlm.data.readers.texts import raise_bad
from lightlm.errors import DataError
from tests.corpus import texts
from tests.data.readers.test_text_files import read

LAYOUTS = {
    "array": lambda records: json.dumps(records),
    "pretty array": lambda records: json.dumps(records, indent=2, ensure_ascii=False),
    "an item per line": lambda records: "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n",
    "pretty records": lambda records: "\n".join(json.dumps(record, indent=4) for record in records),
    "one line": lambda records: " ".join(map(json.dumps, records)),
    "no space": lambda records: "".join(map(json.dumps, records)) + "\n",
    "carriage returns": lambda records: "\r".join(map(json.dumps, records)),
    "lines of arrays": lambda records: "".join(json.dumps([record]) + "\n" for record in records),
}


@settings(max_examples=100)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    suffix=st.sampled_from([".json", ".jsonl"]),
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8),
    chunk=st.integers(1, 40),
)
def test_layouts_round_trip(
    tmp_path_factory: pytest.TempPathFactory, layout: str, suffix: str, documents: list[str], chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"layout{suffix}"
    path.write_text(LAYOUTS[layout]([{"id": 1, "text": text} for text in documents]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "CHUNK_BYTES", chunk)
        assert read(path) == documents


def test_an_array_larger_than_a_block_is_read_item_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 1 << 16)
    for module in (json_values, packing):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 16)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": str(n) + "x" * 1_000} for n in range(5_000)]), encoding="utf-8")
    tracemalloc.start()
    found = [
        len(texts.array) for unit in reader_of(path).units(path, "a", "text", None) for texts in unit.texts(raise_bad)
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(found) == 5_000
    assert peak < path.stat().st_size / 2  # 5 MB


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text":}]', "line 2: not valid JSON"),
        ('[{"text": "a"},\n {"text": "b"}', "line 1: not valid JSON .the array that begins here has no end"),
        ('[{"text": "a"},\n {"text": "b', "line 2: not valid JSON .Unterminated string"),
        ('[{"text": "a"} {"text": "b"}]', "line 1: not valid JSON .a comma"),
        ('["a", "b"]', "line 1: a JSON object was expected"),
        ('[{"text": "a"},\n\n {"body": "b"}]', "line 3: no column 'text'; there are: body"),
        (
            '{"version": 1, "data": [{"title": "x"}]}',
            r"line 1: no column 'text'; there are: version, data.*jq -c '\.data\[\]'",
        ),
    ],
)
def test_mistakes_name_the_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"a\.json, {message}"):
        read(tmp_path / "a.json")


def test_skip_bad_keeps_the_items_before_and_after_a_mistake(tmp_path: Path) -> None:
    items = [
        *({"text": text} for text in texts(10)),
        {"body": 1},
        5,
        {"text": None},
        *({"text": t} for t in texts(10, 1)),
    ]
    (tmp_path / "a.json").write_text(json.dumps(items)[:-1], encoding="utf-8")  # without the last bracket
    made = prepare(str(tmp_path / "a.json"), "train:300", tmp_path / "out", skip_bad=True)
    assert made.documents("train") + made.documents("val") >= 20
    assert made.dropped == {"null": 1, "unreadable": 3}


def test_a_broken_first_line_does_not_change_how_the_others_are_read(tmp_path: Path) -> None:
    for first in ('{"text": ', '{"text": "abc', "junk", '{"text": "a"} junk'):
        path = tmp_path / "a.jsonl"
        path.write_text(first + "\n" + '{"text": "b"}\n{"text": "c"}\n', encoding="utf-8")
        bad: list[DataError] = []
        (unit,) = reader_of(path).units(path, "a", "text", None)
        assert [text for found in unit.texts(bad.append) for text in found.array.to_pylist()] == ["b", "c"]
        assert len(bad) == 1


@pytest.mark.parametrize(
    "content", [f'[{{"text": "a"}}, {{"n": {"1" * 5_000}}}]', f'{{"n": {"1" * 5_000}}} {{"n": 2}}']
)
def test_a_number_that_python_refuses_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json, line 1: not valid JSON \(Exceeds the limit"):
        read(tmp_path / "a.json")
    (tmp_path / "b.txt").write_text("words", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json, line 1"):  # not left out as a file without the column
        read(tmp_path)
