"""The shard format, the data folder's checks, and token streams."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.folder import DataFolder, resolve_dataset
from lightlm.data.prepare.run import prepare
from lightlm.data.shards import TokenStream, open_shard, write_shard
from lightlm.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder of 40 documents whose train split spans several shards."""
    lines = [json.dumps({"text": f"Document number {n} speaks of the number {n * n}."}) for n in range(40)]
    (tmp_path / "source.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(str(tmp_path / "source.jsonl"), "train:300", tmp_path / "out", val_fraction=0.2, shard_tokens=100)
    return tmp_path / "out"


@given(tokens=st.lists(st.integers(0, 65_535), max_size=50))
def test_a_shard_is_llm_c_s_bytes_and_reads_back(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> None:
    path = tmp_path_factory.mktemp("shards") / "s.bin"
    write_shard(path, np.array(tokens, dtype=np.int64))
    raw = path.read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, len(tokens), *[0] * 253)
    assert raw[1024:] == struct.pack(f"<{len(tokens)}H", *tokens)
    assert open_shard(path).tolist() == tokens


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_large_vocabularies_use_the_uint32_variant(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> None:
    path = tmp_path_factory.mktemp("shards") / "s.bin"
    write_shard(path, np.array(tokens, dtype=np.uint32))
    assert struct.unpack("<3i", path.read_bytes()[:12]) == (20240801, 7, len(tokens))
    assert open_shard(path).tolist() == tokens


def test_ids_that_do_not_fit_are_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="70000"):
        write_shard(tmp_path / "s.bin", np.array([1, 70_000]))
    assert not (tmp_path / "s.bin").exists()


def test_damaged_shards_are_refused_with_the_sizes(tmp_path: Path) -> None:
    path = tmp_path / "s.bin"
    write_shard(path, np.arange(100))
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"s\.bin: 1222 bytes, .* take 1224"):
        open_shard(path)
    path.write_bytes(whole[:100])
    with pytest.raises(DataError, match="100 bytes"):
        open_shard(path)
    path.write_bytes(b"not tokens at all" * 100)
    with pytest.raises(DataError, match="not a token shard"):
        open_shard(path)
    with pytest.raises(DataError, match="absent"):
        open_shard(tmp_path / "absent.bin")


@given(data=st.data(), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_a_stream_is_its_shards_end_to_end(data: st.DataObject, sizes: list[int]) -> None:
    flat = np.arange(sum(sizes))
    stream = TokenStream(np.split(flat.astype("<u2"), np.cumsum(sizes)[:-1]), end_of_text_id=0)
    assert len(stream) == len(flat)
    start = data.draw(st.integers(0, len(flat)))
    count = data.draw(st.integers(0, len(flat) - start))
    piece = stream.slice(start, count)
    assert piece.dtype == np.int64
    assert piece.tolist() == flat[start : start + count].tolist()
    with pytest.raises(IndexError):
        stream.slice(start, len(flat) - start + 1)


@pytest.mark.parametrize("tokens", [[5, 6, 9, 7, 9, 8, 4, 9], [9, 5, 6, 9, 7, 9, 8, 4]])
def test_documents_end_or_begin_with_the_end_of_text_token(tokens: list[int]) -> None:
    shards = np.split(np.array(tokens, dtype="<u2"), [1, 5])
    documents = [document.tolist() for document in TokenStream(shards, end_of_text_id=9).documents()]
    assert documents == [[5, 6], [7], [8, 4]]


def test_a_prepared_folder_opens_and_gives_the_text_back(folder: Path) -> None:
    opened = DataFolder.open(folder)
    texts = [opened.tokenizer.decode(d) for split in ("train", "val") for d in opened.split(split).documents()]
    assert sorted(texts) == sorted(f"Document number {n} speaks of the number {n * n}." for n in range(40))
    assert len(opened.split("train")) == opened.manifest.tokens("train")
    assert sum(s.split == "train" for s in opened.manifest.shards) > 1
    opened.verify()


def test_a_missing_folder_names_the_command_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"lightlm prepare-data pydocs$"):
        DataFolder.open(resolve_dataset("pydocs"))
    with pytest.raises(DataError, match=r"lightlm prepare-data SOURCE --out .*elsewhere"):
        DataFolder.open(resolve_dataset("some/elsewhere"))


def test_a_bare_name_means_the_data_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert resolve_dataset("mine") == Path("mine")
    Path("data/mine").mkdir(parents=True)
    assert resolve_dataset("mine") == Path("data/mine")
    assert resolve_dataset("./a/mine") == Path("a/mine")
    assert resolve_dataset("./mine") == resolve_dataset("mine/") == Path("mine")
    assert resolve_dataset("..") == Path("..")


def test_a_foreign_tokenizer_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        DataFolder.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        DataFolder.open(folder)


def test_shards_that_do_not_fit_the_manifest_are_named(folder: Path) -> None:
    good = (folder / "train_000001.bin").read_bytes()
    write_shard(folder / "train_000001.bin", np.arange(10))
    with pytest.raises(DataError, match=r"train_000001\.bin: its header counts 10 uint16 tokens"):
        DataFolder.open(folder)
    (folder / "train_000001.bin").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match=r"train_000001\.bin: checksum"):
        DataFolder.open(folder).verify()
    (folder / "train_000001.bin").unlink()
    with pytest.raises(DataError, match=r"train_000001\.bin: cannot be read"):
        DataFolder.open(folder)


def test_verifying_names_a_stray_shard(folder: Path) -> None:
    write_shard(folder / "train_000099.bin", np.arange(10))
    with pytest.raises(DataError, match=r"train_000099\.bin: the manifest does not list"):
        DataFolder.open(folder).verify()


def test_an_incomplete_manifest_names_the_field(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["shards"][0]["tokens"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"shards\.0\.tokens"):
        DataFolder.open(folder)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="Invalid JSON"):
        DataFolder.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        DataFolder.open(folder)
