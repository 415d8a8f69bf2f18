"""Blocks and pieces: whatever the borders, the workers and the sizes, the folder is the same; large texts too."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.prepare import assembly, blocks
from lightlm.data.prepare.run import prepare
from lightlm.data.prepare.splitting import Candidate, Holder, keys_of
from lightlm.data.readers import jsonl as readers
from lightlm.data.readers import parquet as parquet_reader
from lightlm.data.readers import records, texts
from lightlm.data.shards import DataFolder
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import DataError
from tests.corpus import texts as make_texts
from tests.data.prepare.splitter import Document, Splitter, cut_near_end

TOKENIZER = train_tokenizer(make_texts(100), 400)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


@pytest.fixture
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every border falls somewhere: between units, blocks, chunks, parts of a text, shards and saved states."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3_000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2_000)
    for module in (texts, readers, records, parquet_reader):
        monkeypatch.setattr(module, "CHUNK_BYTES", 700)
    monkeypatch.setattr(texts, "LARGE_BYTES", 1_500)
    monkeypatch.setattr(assembly, "SAVE_TOKENS", 500)
    monkeypatch.setattr(assembly, "COPY_TOKENS", 300)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def routed(documents: list[str], fraction: float) -> dict[str, list[str]]:
    """The splits by the rule said document by document."""
    splitter, result = Splitter(fraction), {"train": [], "val": []}  # type: tuple[Splitter, dict[str, list[str]]]
    for text in documents:
        for split, document in splitter.route(Document(text, [])):
            result[split].append(document.text)
    for split, document in splitter.finish():
        result[split].append(document.text)
    if splitter.only_document is not None:
        for split, text in zip(result, cut_near_end(splitter.only_document, fraction), strict=True):
            result[split] += [text] * bool(text)
    return result


@settings(deadline=None)
@given(
    names=st.lists(st.integers(0, 99), max_size=12, unique=True),
    borders=st.lists(st.integers(0, 12), max_size=4),
    fraction=st.sampled_from([0, 0.01, 0.2, 0.9]),
)
def test_spans_of_blocks_give_the_order_of_the_rule(names: list[int], borders: list[int], fraction: float) -> None:
    """Each document is one token; the blocks' borders fall anywhere."""
    documents = [f"document {name}" for name in names]
    keys = keys_of(pyarrow.array(documents, pyarrow.large_string())).tolist()
    holder, train, val = Holder(None, validated=fraction == 0), [], []  # type: tuple[Holder, list[str], list[str]]
    edges = [0, *sorted(min(border, len(names)) for border in borders), len(names)]
    pieces: list[list[str]] = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        part = list(zip(documents[start:end], keys[start:end], strict=True))
        mine = [(text, key) for text, key in part if key >= fraction * 2**32]
        first = next((n for n, (_, key) in enumerate(part) if key < fraction * 2**32), None)
        pieces.append([text for text, _ in mine])
        prefix = [key for _, key in mine[:first]]
        minima = [
            Candidate(block=number, key=key, start=n, tokens=1, text_bytes=0)
            for n, key in enumerate(prefix)
            if all(key < other for other in prefix[:n])
        ]
        for span in holder.train_spans(number, len(mine), minima, first):
            train += pieces[span.block][span.start : span.start + span.tokens]
        val += [text for text, key in part if key < fraction * 2**32]
    if holder.held is not None:
        val += pieces[holder.held.block][holder.held.start : holder.held.start + 1]
    if len(names) != 1:  # the only document of a source is cut, which is not the holder's work
        assert {"train": train, "val": val} == routed(documents, fraction)


def mixed_source(folder: Path, seed: int) -> list[str]:
    """Files of every kind with documents of 0 to 5,000 bytes, and what the documents are, in order."""
    rng = random.Random(seed)
    folder.mkdir()
    everything: list[str] = []
    for number in range(rng.randint(1, 6)):
        documents = [
            " ".join(
                rng.choice(['"it\'s"', "naïve", "日。", "42", "\\u00e9", "a\nb", "<|endoftext|>"]) for _ in range(n)
            )
            for n in rng.choices([0, 1, 9, 80, 600], k=rng.choice([1, 3, 20]))
        ]
        path = folder / f"{number}"
        match rng.choice(["txt", "jsonl", "parquet"]):
            case "txt":
                documents = documents[:1]
                path.with_suffix(".txt").write_bytes(documents[0].encode())
            case "jsonl":
                lines = [json.dumps({"id": 1, "text": d}, ensure_ascii=n % 2 == 0) for n, d in enumerate(documents)]
                path.with_suffix(".jsonl").write_text("\n".join(lines), encoding="utf-8")
            case _:
                table = pyarrow.table({"text": pyarrow.array([*documents, None])})
                parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=4)
        everything += documents
    return [text for text in everything if text.strip()]


@pytest.mark.parametrize("seed", range(8))
def test_the_folder_does_not_depend_on_borders_or_workers(
    seed: int, tmp_path: Path, tokenizer: str, request: pytest.FixtureRequest
) -> None:
    documents = mixed_source(tmp_path / "source", seed)
    fraction = [0, 0.001, 0.2][seed % 3]

    def made(name: str, **options: Any) -> dict[str, bytes] | str:
        out = tmp_path / name
        try:
            prepare(str(tmp_path / "source"), tokenizer, out, val_fraction=fraction, shard_tokens=400, **options)
        except DataError as error:
            return str(error)
        return contents(out)

    whole = made("whole", workers=1), made("whole-limited", workers=1, max_tokens=900)
    request.getfixturevalue("tiny_sizes")
    assert made("tiny", workers=3) == whole[0]
    assert made("tiny-limited", workers=3, max_tokens=900) == whole[1]
    if isinstance(whole[0], dict):
        folder = DataFolder.open(tmp_path / "tiny")
        found = {s: [folder.tokenizer.decode(d) for d in folder.split(s).documents()] for s in ("train", "val")}
        assert found == routed(documents, fraction)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("fraction", [0.1, 0.0])
def test_one_large_document_has_the_ids_of_the_whole(
    suffix: str, fraction: float, tmp_path: Path, tokenizer: str, tiny_sizes: None
) -> None:
    import gzip

    text = "".join(f'Line {n}: naïve "quotes", \\ 日本。 {n * n}\n' for n in range(300))
    path, line = tmp_path / f"one{suffix}", json.dumps({"before": {"text": "no"}, "text": text, "z": [1, "]"]}).encode()
    match suffix:
        case ".txt":
            path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        case ".jsonl":
            path.write_bytes(line)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(line))
        case _:
            parquet.write_table(pyarrow.table({"text": [text]}), path)
    manifest = prepare(str(path), tokenizer, tmp_path / "out", val_fraction=fraction)
    folder = DataFolder.open(tmp_path / "out")
    parts = [part for part in cut_near_end(text, fraction) if part]
    found = [ids.tolist() for split in ("train", "val") for ids in folder.split(split).documents()]
    assert found == [TOKENIZER.encode(part) for part in parts]
    assert sum(manifest.text_bytes.values()) == len(text.encode())


def test_filters_say_which_documents_to_leave_out(tmp_path: Path, tokenizer: str, tiny_sizes: None) -> None:
    documents = [f"Text {n}. " + "The river remembers. " * (n % 5 * 30) for n in range(60)]
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    numbers: dict[str, list[int]] = {}

    def even(unit: str, first: int, array: Any) -> dict[int, str]:
        numbers.setdefault(unit, []).extend(range(first, first + len(array)))
        return {n: "even" for n, text in enumerate(array.to_pylist()) if int(text.split()[1][:-1]) % 2 == 0}

    manifest = prepare(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "out", filters=(even,), workers=1)
    small = [n for n, text in enumerate(documents) if len(text) < 1_500]
    assert manifest.dropped == {"even": sum(n % 2 == 0 for n in small)}
    folder = DataFolder.open(tmp_path / "out")
    kept = [folder.tokenizer.decode(d) for split in ("train", "val") for d in folder.split(split).documents()]
    assert sorted(kept) == sorted(text for n, text in enumerate(documents) if n % 2 or n not in small)
    assert sum(map(len, numbers.values())) == len(small)
    assert all(found == sorted(set(found)) for found in numbers.values())


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
@pytest.mark.parametrize("limit", [None, 10])
def test_the_only_good_document_is_cut_alone_beside_large_bad_ones(
    order: tuple[int, ...],
    limit: int | None,
    tmp_path: Path,
    tokenizer: str,
    tiny_sizes: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a large document turns out to be in its middle, when its beginning has been read."""
    for module in (blocks, readers):  # all in one block
        monkeypatch.setattr(module, "BLOCK_BYTES", 100_000)
    good = json.dumps({"text": "".join(f"Line {n} of the good document.\n" for n in range(200))})
    bad = '{"text": "' + "A beginning of words. " * 300 + "\\q" + ' and more."}'
    lines = {"good": [good], "both": [[bad, good][which] for which in order]}
    folders = {}
    for name, chosen in lines.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(chosen), encoding="utf-8")
        manifest = prepare(str(path), tokenizer, tmp_path / name, val_fraction=0.1, skip_bad=True, max_tokens=limit)
        folders[name] = {key: data for key, data in contents(tmp_path / name).items() if key != "manifest.json"}
    seen = order if limit is None else order[: order.index(1) + 1]
    assert manifest.dropped == ({"unreadable": seen.count(0)} if 0 in seen else {})
    assert folders["both"] == folders["good"]
    assert len(folders["good"]) == 3  # a train and a val shard, and the tokenizer


def test_bytes_of_text_follow_the_document_that_validation_gets(tmp_path: Path, tokenizer: str) -> None:
    documents = make_texts(20)
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    manifest = prepare(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "out", val_fraction=1e-9)
    (held,) = DataFolder.open(tmp_path / "out").split("val").documents()
    held_bytes = len(TOKENIZER.decode(held).encode())
    assert manifest.text_bytes == {
        "train": sum(len(text.encode()) for text in documents) - held_bytes,
        "val": held_bytes,
    }


def test_a_cut_is_tried_before_it_is_trusted(tmp_path: Path, tiny_sizes: None) -> None:
    """A pre-tokenizer that joins what the borders of others part: two words and the space between them."""
    import tokenizers
    from tokenizers import Regex, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    pairs = pre_tokenizers.Split(Regex(r"\w+ \w+"), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pairs, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    made.train_from_iterator(["ab cd. " * 9, "x yz! " * 9], trainer)
    made.save(str(tmp_path / "pairs.json"))
    text = "ab cd. x yz! " * 300
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepare(str(tmp_path / "a.txt"), str(tmp_path / "pairs.json"), tmp_path / "out", val_fraction=0)
    folder = DataFolder.open(tmp_path / "out")
    (found,) = folder.split("train").documents()
    assert found.tolist() == made.encode(text).ids
