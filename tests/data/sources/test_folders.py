"""What a folder holds: which files are read, links, and what is counted because it is not read."""

import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lightlm.data.prepare.run import prepare
from lightlm.data.sources.folder_walk import kind_of
from lightlm.data.sources.local import LocalSource
from lightlm.data.sources.registry import open_source
from lightlm.data.sources.stdin import standard_input, suffix_for
from lightlm.errors import DataError
from tests.corpus import read_unit, texts, write_jsonl

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


def read(source: LocalSource) -> list[str]:
    return [text for unit in source.units() for text in read_unit(unit)]


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


@needs_links
def test_a_link_to_a_blob_is_read_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "r1").mkdir(parents=True)
    write_jsonl(tmp_path / "blobs" / "0a1b2c", 3)
    link = tmp_path / "snapshots" / "r1" / "d.jsonl"
    link.symlink_to("../../blobs/0a1b2c")
    for path in (link, link.parent):
        assert read(LocalSource(path, "text")) == texts(3)
    assert LocalSource(link, "text").name == "d"
    (tmp_path / "corpus").symlink_to(link.parent)
    assert LocalSource(tmp_path / "corpus", "text").name == "corpus"


@needs_links
def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    root = write(tmp_path / "root", a_txt="a", sub__b_txt="b")
    write(tmp_path / "other", c_txt="c", deep__d_txt="d")
    (root / "linked").symlink_to(tmp_path / "other")
    (root / "again").symlink_to("sub")  # a real folder in the tree comes first
    (root / "sub" / "up").symlink_to("..")
    (root / "zz").symlink_to(tmp_path / "other" / "deep")
    (root / "itself").symlink_to("itself")
    (root / ".itself").symlink_to(".itself")
    source = LocalSource(root, "text")
    assert read(source) == ["a", "c", "d", "b"]
    assert "2 of them in linked folders" in source.description
    assert source.file_counts.left_out == {
        "link to a folder that is read elsewhere": 3,
        "broken link": 1,
        "hidden file": 1,
    }


@needs_links
def test_broken_links_are_named_or_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "root", a_txt="a")
    (root / "notes").symlink_to("absent")
    assert LocalSource(root, "text").file_counts.left_out == {"broken link": 1}
    (root / "b.txt").symlink_to("absent")
    with pytest.raises(DataError, match=r"b\.txt is a link to absent, which does not exist.*--skip-bad"):
        read(LocalSource(root, "text"))
    with pytest.raises(DataError, match=r"b\.txt is a link to absent"):
        LocalSource(root / "b.txt", "text")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_not_opened(tmp_path: Path) -> None:
    root = write(tmp_path / "root", a_txt="a")
    os.mkfifo(root / "b.txt")
    assert LocalSource(root, "text").file_counts.left_out == {"pipe or device": 1}
    with pytest.raises(DataError, match=r"b\.txt is a pipe or a device.*prepare-data -"):
        LocalSource(root / "b.txt", "text")


def test_what_is_not_read_is_counted_by_suffix(tmp_path: Path) -> None:
    root = write(
        tmp_path / "root", README_md="words", x_PNG="", y_png="", z_tar_gz="", LICENSE="", package_json='{"name": "x"}',
        b_csv="id,body\n1,a\n", c_csv="id,text\n1,from csv\n", sub__deep_pdf="", run_000123="",
    )  # fmt: skip
    (root / ".hidden.txt").write_text("no", encoding="utf-8")
    (root / ".git").mkdir()
    (root / ".git" / "x.txt").write_text("no", encoding="utf-8")
    (root / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    source = LocalSource(root, "text")
    assert source.file_counts.read == {".csv": 1, ".md": 1, ".txt.gz": 1}
    assert source.file_counts.left_out == {
        ".png": 2, ".tar.gz": 1, "without suffix": 1, ".json without a column 'text'": 1, ".pdf": 1, "other": 1,
        ".csv without a column 'text'": 1, "hidden file": 1, "hidden folder": 1,
    }  # fmt: skip
    assert read(source) == ["words", "from csv", "packed"]
    made = prepare(source, "train:300", tmp_path / "out")
    assert (made.files_read, made.files_left_out) == (source.file_counts.read, source.file_counts.left_out)


def test_a_folder_without_the_column_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.csv, line 1: no column 'text'; there are: id, body"):
        read(LocalSource(write(tmp_path / "root", b_csv="id,body\n1,a\n"), "text"))
    with pytest.raises(DataError, match=r"no file in this folder can be read \(found: 1 \.png\)"):
        LocalSource(write(tmp_path / "other", a_png=""), "text")


def test_suffixes_under_which_files_are_counted() -> None:
    names = {
        "a.PDF": ".pdf", "a.tar.gz": ".tar.gz", "x.7z": ".7z", "a.0001": "other", "LICENSE": "without suffix",
        "v1.2 notes by me": "other", "a.caf\udce9": "other",
    }  # fmt: skip
    assert {name: kind_of(name) for name in names} == names


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "root", a_txt="some words " * 20)
    source = LocalSource(root, "text")
    (root / "a.txt").write_text("other words, and more of them " * 20, encoding="utf-8")
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(source, "train:300", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert prepare(LocalSource(root, "text"), "train:300", tmp_path / "out").documents("train")


ITEMS = [{"text": "a b"}, {"text": "c d"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps(ITEMS).encode(), ["a b", "c d"]),
        (json.dumps(ITEMS).encode("utf-16"), ["a b", "c d"]),
        (gzip.compress(json.dumps(ITEMS).encode()), ["a b", "c d"]),
        (b'\n\n {"text": "a b"}\n{"text": "c d"}\n', ["a b", "c d"]),
        (b"[Music] plain text", ["[Music] plain text"]),
        (gzip.compress(b"packed text"), ["packed text"]),
        ("marked".encode("utf-16"), ["marked"]),
        (b"", [""]),
    ],
    ids=range(8),
)
def test_standard_input_is_told_by_its_content(
    content: bytes, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with standard_input(tmp_path / "out", "text") as source:
        assert read(source) == expected


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (b'["a b", "c d"]', ".jsonl"),
        (b'[[{"text": "a b"}]]', ".jsonl"),
        (b" [ ]\n", ".jsonl"),
        (b"[] milk\n[x] bread", ".txt"),
        (b"[1, 2] say so", ".txt"),
    ],
    ids=range(5),
)
def test_an_array_in_a_pipe_is_never_taken_as_prose(content: bytes, suffix: str) -> None:
    assert suffix_for(content) == suffix


def test_a_mistake_in_a_pipe_names_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy is gone when the message is read."""
    for content, words in ((b'["a b"]', "standard input, line 1: a JSON object"), (b"a\0b", "standard input: a NUL")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with standard_input(tmp_path / "out", "text") as source, pytest.raises(DataError, match=words):
            read(source)


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*.txt", "a/*.txt"])
def test_a_folder_that_cannot_be_read_ends_a_glob_too(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a__b_txt="a", c__d_txt="c")
    (tmp_path / ".hidden").mkdir()
    scandir = os.scandir

    def refused(path: Any = ".") -> Any:
        if Path(path).name in ("a", ".hidden"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"a: this folder cannot be read \(Permission denied\)"):
        read(open_source(str(tmp_path / pattern), "text"))
    source = open_source(str(tmp_path / "c*/*.txt"), "text")
    assert [text for unit in source.units() for text in read_unit(unit)] == ["c"]


def test_an_unreadable_folder_is_skipped_with_skip_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "in", a__b_txt="a", c__d_txt="some words", lost_found__x_txt="x")
    (root / "lost.found").rename(root / "lost+found")
    scandir = os.scandir

    def refused(path: Any = ".") -> Any:
        if isinstance(path, str | Path) and Path(path).name in ("a", "lost+found"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"a: this folder cannot be read \(Permission denied\).*--skip-bad"):
        prepare(str(root), "train:300", tmp_path / "out", val_fraction=0.0)
    made = prepare(str(root), "train:300", tmp_path / "out", val_fraction=0.0, skip_bad=True)
    assert (made.documents("train"), made.dropped, made.files_left_out) == (1, {"unreadable": 1}, {"hidden folder": 1})
    assert "a: this folder cannot be read" in made.bad[0]
    with pytest.raises(DataError, match="this folder cannot be read"):
        open_source(str(root / "a"), "text")
