"""A source or a file type is added by one registration."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from lightlm.data.prepare.run import prepare
from lightlm.data.readers.file import File
from lightlm.data.readers.registry import READERS, Reader
from lightlm.data.readers.texts import Unit, pack_strings
from lightlm.data.select.filters import Filter
from lightlm.data.sources.registry import NAMES, open_source
from lightlm.errors import DataError
from tests.corpus import read_unit, texts


@dataclass(frozen=True)
class Stub:
    spec: str
    name: str = "stub"
    description: str = "a stub"
    fingerprint: str = "1"
    revision: str = "1"

    def units(self) -> Iterator[Unit]:
        yield Unit("all", partial(pack_strings, partial(texts, 50)))


def test_a_source_is_one_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMES, "stub", lambda spec, text_column, row_filter: Stub(spec))
    assert prepare("stub:small@v1", "train:300", tmp_path / "out").source == "stub:small@v1"
    with pytest.raises(DataError, match=r"Did you mean stub\?"):
        open_source("stubb")


def paragraphs(file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]:
    with file.open("rb") as opened:
        documents = opened.read().decode().split("\n\n")
    yield Unit(name, partial(pack_strings, lambda: documents))


def test_a_file_type_is_one_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.paragraphs").write_text("one\n\ntwo", encoding="utf-8")
    with pytest.raises(DataError, match="this kind of file cannot be read"):
        open_source(str(tmp_path / "a.paragraphs"))
    monkeypatch.setitem(READERS, ".paragraphs", Reader(paragraphs, has_columns=False))
    source = open_source(str(tmp_path / "a.paragraphs"))
    assert source.name == "a"
    assert [text for unit in source.units() for text in read_unit(unit)] == ["one", "two"]
    with pytest.raises(DataError, match="without columns"):
        open_source(str(tmp_path), row_filter=Filter("score > 1"))
