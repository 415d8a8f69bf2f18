"""Text in any encoding that names itself and in every compression; what is not text is named with what to do."""

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.readers import plain
from lightlm.data.readers.texts import raise_bad
from lightlm.data.sources.registry import open_source
from lightlm.errors import DataError
from tests.corpus import read_unit

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
MARKED = ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"]
CONTENT = {  # each kind of file with the texts "héllo ☃" and "two"
    ".txt": "héllo ☃",
    ".text": "héllo ☃",
    ".md": "héllo ☃",
    ".jsonl": '{"text": "héllo ☃"}\n{"text": "two"}\n',
    ".ndjson": '{"text": "héllo ☃"}\n{"text": "two"}\n',
    ".json": '[{"text": "héllo ☃"},\n {"text": "two"}]',
    ".csv": "id,text\n1,héllo ☃\n2,two\n",
    ".tsv": "id\ttext\n1\théllo ☃\n2\ttwo\n",
}


def read(path: Path, column: str = "text") -> list[str]:
    return [text for unit in open_source(str(path), column).units() for text in read_unit(unit)]


def encoded(text: str, encoding: str) -> bytes:
    return ("\ufeff" * encoding.endswith(("-le", "-be")) + text).encode(encoding)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", CONTENT)
def test_every_kind_of_text_in_every_compression_and_encoding(suffix: str, compression: str, tmp_path: Path) -> None:
    for encoding in ["utf-8", *MARKED]:
        path = tmp_path / f"{encoding}{suffix.upper()}{compression}"
        path.write_bytes(COMPRESS[compression](encoded(CONTENT[suffix], encoding)))
        assert read(path) == ["héllo ☃", "two"][: 1 if suffix in (".txt", ".text", ".md") else 2]
        assert open_source(str(path)).name == encoding


@settings(max_examples=30)
@given(
    text=st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])), encoding=st.sampled_from(MARKED)
)
def test_marked_text_round_trips(tmp_path_factory: pytest.TempPathFactory, text: str, encoding: str) -> None:
    path = tmp_path_factory.getbasetemp() / "round.txt"
    path.write_bytes(encoded(text, encoding))
    assert read(path) == [text]


def test_members_and_frames_follow_one_another(tmp_path: Path) -> None:
    for compression, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{compression}"
        path.write_bytes(compress(b"one, ") + compress(b"two"))
        assert read(path) == ["one, two"]


def test_frames_of_zstd_with_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(b"long words") + compressor.flush()
    assert zstandard.get_frame_parameters(data).window_size > 1 << 27  # more than decoders take by default
    (tmp_path / "a.txt.zst").write_bytes(data)
    assert read(tmp_path / "a.txt.zst") == ["long words"]


NOISE = os.urandom(2_000).hex().encode()


@pytest.mark.parametrize("compression", [".gz", ".zst", ".xz", ".bz2"])
def test_truncated_and_misnamed_compression_is_named(compression: str, tmp_path: Path) -> None:
    whole = COMPRESS[compression](NOISE)
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=rf"a\.txt\{compression}: damaged or truncated"):
        read(path)
    path.write_bytes(b"plain words")
    with pytest.raises(DataError, match=rf"not compressed as its name says.* remove \{compression} from its name"):
        read(path)
    other = ".xz" if compression == ".gz" else ".gz"
    path.write_bytes(COMPRESS[other](b"words"))
    with pytest.raises(DataError, match=rf"ends in \{compression}, but it is compressed as \{other}"):
        read(path)
    for name in ("b.txt", "b.jsonl"):
        (tmp_path / name).write_bytes(whole)
        with pytest.raises(DataError, match=rf"compressed \(\{compression}\).*add \{compression} to its name"):
            read(tmp_path / name)
    path.write_bytes(b"")
    assert read(path) == [""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", r"a PDF.*extract its text"),
        (b"PK\x03\x04\x14\0\0\0", r"a zip archive.*extract it"),
        (b"words " * 100 + b"\0\0\0" + b"words", "a NUL character at offset 600"),
        ("plain words é\n".encode("utf-16-le"), "UTF-16LE without a byte-order mark.*iconv -f UTF-16LE -t UTF-8"),
        ("plain words é\n".encode("utf-16-be"), "iconv -f UTF-16BE"),
        ("plain words é\n".encode("utf-32-le"), "iconv -f UTF-32LE"),
        ("a café in the town".encode("latin-1"), "byte 0xe9 at offset 5.*iconv -f LATIN1"),
        ("some “quoted” – text".encode("cp1252"), "iconv -f CP1252"),
        ("これは日本語の文章です。".encode("shift-jis"), r"Find its encoding.*iconv -f ENCODING"),
        ("é".encode() * 50 + b"\xff" + "é".encode() * 50, "drop the damaged characters: iconv -c -f UTF-8"),
        (b"\xff\xfea", "mark says utf-16-le, but it is not"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n", "git lfs pull"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)  # fmt: skip
def test_what_is_not_text_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt: .*{message}.*"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_git_lfs_pointers_are_named_whatever_the_suffix(name: str, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"
    (tmp_path / name).write_bytes(pointer)
    with pytest.raises(DataError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
        read(tmp_path / name)


def test_a_column_named_by_dots_and_one_whose_name_has_a_dot(tmp_path: Path) -> None:
    records = [{"doc": {"body": "nested"}}, {"doc": None}, {"doc.body": "by name", "doc": {"body": "other"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert read(tmp_path / "a.jsonl", "doc.body") == ["nested", "by name"]
    with pytest.raises(DataError, match=r"no column 'text'; there are: doc\.body"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"'doc' holds dict, not text.*for example doc\.body"):
        read(tmp_path / "a.jsonl", "doc")


@pytest.mark.parametrize(
    ("compression", "count", "share"),  # of the lines before the cut that a decompressor gives: it has blocks
    [(".gz", 20_000, 0.7), (".zst", 20_000, 0.25), (".xz", 20_000, 0.7), (".bz2", 90_000, 0.25)],
)
def test_the_lines_before_a_cut_are_read(compression: str, count: int, share: float, tmp_path: Path) -> None:
    noise = random.Random(0)
    lines = [
        json.dumps({"text": f"{noise.random()}"}).encode() + b"\n"
        for _ in range(90_000 if compression == ".bz2" else 20_000)
    ]
    whole = COMPRESS[compression](b"".join(lines))
    (tmp_path / f"a.jsonl{compression}").write_bytes(whole[: len(whole) * 3 // 4])
    (unit,) = open_source(str(tmp_path / f"a.jsonl{compression}"), "text").units()
    bad: list[str] = []
    found: list[str] = []
    texts = unit.texts(lambda error: bad.append(str(error)))
    with pytest.raises(DataError, match="damaged or truncated"):
        found.extend(text for each in texts for text in each.array.to_pylist())
    assert not bad
    assert found == [json.loads(line)["text"] for line in lines[: len(found)]]
    assert len(found) > len(lines) * share


def test_a_text_file_below_the_large_ones_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CHUNK_BYTES", 40)
    monkeypatch.setattr(plain, "LARGE_BYTES", 100)
    path = tmp_path / "a.txt"
    for size, parts in [(30, 1), (90, 1), (100, 1), (101, 3), (170, 5)]:
        path.write_bytes(b"x" * size)
        (unit,) = open_source(str(path), "text").units()
        found = list(unit.texts(raise_bad))
        assert len(found) == parts
        assert [texts.unfinished for texts in found] == [True] * (parts - 1) + [False]
        assert "".join(texts.array[0].as_py() for texts in found) == "x" * size
