"""Folders of other programs' shards, written by hand to their definitions; llm.c's are in tests/train."""

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.folder import DataFolder, check_prepared
from lightlm.data.foreign import folders
from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.errors import DataError

TEXTS = [f"Document number {index}: the cat sat on the mat, and the dog did not." for index in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def documents(tokenizer):
    return [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in TEXTS]


def joined(documents):
    return [index for document in documents for index in document]


def write_datatrove(folder, name, documents, *, token_bytes=2, index=True, metadata="some/tokenizer"):
    """As TokenizedFile of datatrove 0.10: tokens, uint64 ends of documents, and three lines of metadata."""
    tokens = joined(documents)
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(np.array(tokens, f"<u{token_bytes}").tobytes())
    ends = np.cumsum([len(document) for document in documents])
    if index:
        (folder / f"{name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        (folder / f"{name}.metadata").write_text(f"{metadata}|{token_bytes}\n{len(tokens)}\n{len(tokens)} T")
    return folder


def tokens_of(folder, split):
    stream = folder.split(split)
    return stream.slice(0, len(stream)).tolist()


def test_nanogpts_files(tokenizer, documents, tmp_path):
    tokens = joined(documents)
    np.array(tokens[:-100], np.uint16).tofile(tmp_path / "train.bin")
    np.array(tokens[-100:], np.uint16).tofile(tmp_path / "val.bin")
    tokenizer.save(tmp_path / "tokenizer.json")
    folder = DataFolder.open(tmp_path)
    assert (tokens_of(folder, "train"), tokens_of(folder, "val")) == (tokens[:-100], tokens[-100:])
    check_prepared([tmp_path])
    assert "nanoGPT" in folder.manifest.description


def test_characters_of_nanogpt(tmp_path):
    """data/shakespeare_char: the tokenizer is meta.pkl."""
    text = "".join(TEXTS)
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    np.array([ids[character] for character in text], np.uint16).tofile(tmp_path / "train.bin")
    meta = {"vocab_size": len(ids), "itos": {index: character for character, index in ids.items()}, "stoi": ids}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    folder = DataFolder.open(tmp_path)
    assert folder.tokenizer.decode(tokens_of(folder, "train") + tokens_of(folder, "val")) == text
    assert folder.manifest.vocab_size == len(ids) + 1


def test_files_with_a_header_under_nanogpts_names(tokenizer, documents, tmp_path):
    tokens = joined(documents)
    header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    (tmp_path / "train.bin").write_bytes(header + np.array(tokens, "<u2").tobytes())
    tokenizer.save(tmp_path / "tokenizer.json")
    folder = DataFolder.open(tmp_path)
    assert tokens_of(folder, "train") + tokens_of(folder, "val") == tokens


@pytest.mark.parametrize("token_bytes", [2, 4])
@pytest.mark.parametrize("metadata", ["some/tokenizer", ""])
def test_datatroves_files(token_bytes, metadata, tokenizer, documents, tmp_path):
    write_datatrove(tmp_path, "00000_00000_shuffled.ds", documents[:40], token_bytes=token_bytes, metadata=metadata)
    write_datatrove(tmp_path, "00001_00000_shuffled.ds", documents[40:], token_bytes=token_bytes, metadata=metadata)
    tokenizer.save(tmp_path / "tokenizer.json")
    folder = DataFolder.open(tmp_path)
    train, val = tokens_of(folder, "train"), tokens_of(folder, "val")
    assert train + val == joined(documents)
    assert len(val) > 0
    # The cut is between two documents, and both parts count theirs.
    assert train[-1] == tokenizer.end_of_text_id
    manifest = folder.manifest
    assert manifest.documents("train") == train.count(tokenizer.end_of_text_id)
    assert manifest.documents("val") == val.count(tokenizer.end_of_text_id)
    assert [list(document) for document in folder.split("val").documents()] == [
        document[:-1] for document in documents[manifest.documents("train") :]
    ]


def test_a_file_for_validation_by_its_name(tokenizer, documents, tmp_path):
    write_datatrove(tmp_path, "fineweb_00000_00000_shuffled.ds", documents[:50])
    write_datatrove(tmp_path, "val_00000_00000_shuffled.ds", documents[50:])
    tokenizer.save(tmp_path / "tokenizer.json")
    folder = DataFolder.open(tmp_path)
    assert (tokens_of(folder, "train"), tokens_of(folder, "val")) == (joined(documents[:50]), joined(documents[50:]))


def test_the_tokenizer_that_the_metadata_names(tokenizer, documents, tmp_path, monkeypatch):
    write_datatrove(tmp_path, "00000_unshuffled.ds", documents, metadata="HuggingFaceTB/SmolLM-360M")
    monkeypatch.setattr(folders, "load_tokenizer", lambda name, _: {"HuggingFaceTB/SmolLM-360M": tokenizer}[name])
    assert DataFolder.open(tmp_path).tokenizer is tokenizer
    write_datatrove(tmp_path, "00001_unshuffled.ds", documents, metadata="gpt2")
    with pytest.raises(DataError, match="shards of the tokenizers HuggingFaceTB/SmolLM-360M, gpt2; take them apart"):
        DataFolder.open(tmp_path)


def test_the_separator_that_the_shards_show(tmp_path):
    """A tokenizer with two special tokens, of which the writer took the second."""
    original = train_tokenizer(TEXTS, 300)
    end = original.vocab_size
    content = original.content | {"added_tokens": [*original.content["added_tokens"], special(end, "<|im_end|>")]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.read(tmp_path)
    assert tokenizer.end_of_text == "<|endoftext|>"
    write_datatrove(tmp_path, "00000_unshuffled.ds", [[*tokenizer.encode(text), end] for text in TEXTS])
    assert DataFolder.open(tmp_path).manifest.end_of_text_id == end


def special(index, content):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": True, **flags}


def test_what_does_not_fit_is_named(tokenizer, documents, tmp_path):
    name = "00000_unshuffled.ds"
    path = write_datatrove(tmp_path, name, documents) / name
    tokenizer.save(tmp_path / "tokenizer.json")
    whole = path.read_bytes()
    for damage, message in (
        (lambda: path.write_bytes(whole[:-3]), "are not whole uint16 numbers"),
        (lambda: path.write_bytes(whole[:-4]), "tokens, but the files beside it say"),
        (lambda: path.with_name(f"{name}.index").write_bytes(b"12345"), "are not whole uint64 numbers"),
        (lambda: path.with_name(f"{name}.index").write_bytes(struct.pack("<2Q", 2**63, 5)), "files beside it say"),
        (lambda: path.with_name(f"{name}.metadata").write_text("nonsense"), "is not what datatrove writes"),
        (lambda: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"), "Git LFS"),
    ):
        write_datatrove(tmp_path, name, documents)
        damage()
        with pytest.raises(DataError, match=message):
            DataFolder.open(tmp_path)
    write_datatrove(tmp_path, name, [[5, 299], [7, 40_000]])
    with pytest.raises(DataError, match="holds the token id 40000, but the tokenizer has"):
        DataFolder.open(tmp_path)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.booleans())
def test_the_cut_keeps_every_token(lengths, indexed):
    """Nothing is lost or doubled, and validation gets its share from the beginning of a document near by."""
    documents = [[1] * (length - 1) + [0] for length in lengths]
    tokens = np.array(joined(documents), np.uint16)
    shard = folders._Shard(tokens, np.cumsum(lengths).astype(np.uint64) if indexed else np.zeros(0, np.uint64))
    train, val = folders._cut(shard, len(tokens), 0)
    assert np.array_equal(np.concatenate((train.tokens, val.tokens)), tokens)
    least = min(1024, -(-len(tokens) // 10))
    assert len(val.tokens) <= max(least, -(-len(tokens) // 200))
    assert len(val.tokens) >= least // 2
    if indexed:
        assert len(train.ends) + len(val.ends) == len(documents)
        assert not len(val.ends) or val.ends[-1] == len(val.tokens)
