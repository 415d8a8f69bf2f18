"""JSON lines above the limit: refused by line, skipped with --skip-bad, and never held whole."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import jsonl
from lightlm.data.readers.registry import reader_of
from lightlm.errors import DataError
from tests.corpus import texts

LIMIT = 2_000


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "RECORD_BYTES", LIMIT)
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 100)


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def write(path: Path, content: bytes) -> Path:
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_above_the_limit_is_refused_and_can_be_skipped(suffix: str, tmp_path: Path, small_limit: None) -> None:
    fits = line("x" * (LIMIT - len(line(""))) + "y")
    assert len(fits.rstrip()) == LIMIT
    documents = texts(20)
    lines = [*map(line, documents[:10]), line("x" * 5 * LIMIT), fits, *map(line, documents[10:]), line("y" * LIMIT)]
    path = write(tmp_path / f"a{suffix}", b"".join(lines))
    with pytest.raises(DataError, match=rf"a{suffix}, line 11: more than .* MB of JSON.*\.txt.*--skip-bad"):
        prepare(str(path), "train:300", tmp_path / "out")
    made = prepare(str(path), "train:300", tmp_path / "out", skip_bad=True)
    assert made.dropped == {"unreadable": 2}
    assert [message.partition(":")[0] for message in made.bad] == [f"{path}, line 11", f"{path}, line 23"]
    folder = DataFolder.open(tmp_path / "out")
    found = [folder.tokenizer.decode(d) for split in ("train", "val") for d in folder.split(split).documents()]
    assert sorted(found) == sorted([*documents, json.loads(fits)["text"]])


@pytest.mark.parametrize("block", [300, LIMIT, 7 * LIMIT])
def test_each_other_line_is_read_once_whatever_the_blocks(
    block: int, tmp_path: Path, small_limit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", block)
    lines = [line(f"{n} " + "x" * (LIMIT * 3 if n % 3 == 0 else n * 50)) for n in range(20)]
    path = write(tmp_path / "a.jsonl", b"".join(lines))
    bad: list[str] = []
    units = list(reader_of(path).units(path, "a", "text", None))
    streams = [unit.texts(lambda error: bad.append(str(error))) for unit in units]
    found = [text for stream in streams for array, _ in stream for text in array.to_pylist()]
    assert [int(text.split()[0]) for text in found] == [n for n in range(20) if n % 3]
    assert [message.partition(":")[0] for message in bad] == [f"{path}, line {n + 1}" for n in range(0, 20, 3)]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_large_line_is_not_held_whole(
    suffix: str, skip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 1 << 16)
    path = write(tmp_path / f"a{suffix}", line("x" * (40 << 20)) + line("after"))
    bad: list[DataError] = []

    def reject(error: DataError) -> None:
        bad.append(error)
        if not skip:
            raise error

    tracemalloc.start()
    try:
        found = [
            text
            for unit in reader_of(path).units(path, "a", "text", None)
            for array, _ in unit.texts(reject)
            for text in array
        ]
    except DataError:
        found = []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert len(bad) == 1
    assert [text.as_py() for text in found] == ["after"] * skip
