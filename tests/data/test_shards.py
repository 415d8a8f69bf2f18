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
from lightlm.data.shards import Manifest, ShardEntry, TokenStream, open_shard
from lightlm.errors import DataError
from tests.corpus import write_shard


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


def with_validation(documents: int, tokens: int, train_documents: int, train_tokens: int) -> Manifest:
    sizes = {"train": (train_documents, train_tokens), "val": (documents, tokens)}
    shards = [
        ShardEntry(file=split, split=split, tokens=size, documents=count, xxh3="")
        for split, (count, size) in sizes.items()
        if size
    ]
    return Manifest(
        source="", description="", tokenizer_sha256="", vocab_size=9, end_of_text_id=0, shards=shards, split_rule="",
        text_bytes={"train": 0, "val": 0},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "small"),
    [
        ((1, 14, 199, 2_800), "1 document, 14 tokens"),
        ((1, 7_157, 231, 1_400_000), "1 document, 7,157 tokens"),
        ((40, 19_999, 4_000, 4_000_000), "40 documents, 19,999 tokens"),
        ((9, 900_000, 1_000, 90_000_000), "9 documents, 900,000 tokens"),
        ((1, 30_000, 1, 270_000), ""),  # one text, cut in two
        ((10, 20_000, 1_000, 2_000_000), ""),
        ((0, 5_000, 0, 5_000_000), "5,000 tokens"),  # shards of another program do not count documents
        ((0, 0, 5, 100), ""),
    ],
)
def test_a_validation_split_that_says_little_is_named(sizes: tuple[int, int, int, int], small: str) -> None:
    assert with_validation(*sizes).small_validation == small


def test_the_suggested_share_is_enough_and_at_most_a_tenth() -> None:
    assert with_validation(1, 7_157, 231, 1_400_000).suggested_val_fraction == 0.09
    assert with_validation(1, 14, 199, 2_800).suggested_val_fraction == 0.1
    assert with_validation(40, 19_999, 4_000, 4_000_000).suggested_val_fraction == 0.01


@pytest.mark.parametrize(
    ("end", "length", "several"),
    [(0, 5, True), (3, 5, True), (4, 5, False), (None, 5, False), (1 << 20, 1_048_580, True)],
)
def test_documents_are_found_where_more_follows_an_end(end: int | None, length: int, several: bool) -> None:
    tokens = np.ones(length, np.uint16)
    if end is not None:
        tokens[end] = 9
    assert TokenStream([tokens[:3], tokens[3:]], 9).holds_documents() is several


def test_a_folder_that_an_earlier_version_mixed_opens(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    part = {"source": "a", "share": 0.7, "reached": 0.7, "tokens": 7, "documents": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"mixture": [part]}), encoding="utf-8")
    assert len(DataFolder.open(folder).split("train")) == DataFolder.open(folder).verify().tokens("train") > 0
