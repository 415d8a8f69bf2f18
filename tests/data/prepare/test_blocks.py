"""Blocks: whatever the borders, the workers and the sizes, the folder is the same; large texts too."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from lightlm.data.folder import DataFolder
from lightlm.data.prepare import assembly, blocks, encoded_block
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import jsonl as readers
from lightlm.data.readers import parquet as parquet_reader
from lightlm.data.readers import texts
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import DataError
from tests.corpus import texts as make_texts
from tests.data.prepare.splitter import expected_split, tokens_of

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
    for module in (texts, readers, parquet_reader):
        monkeypatch.setattr(module, "CHUNK_BYTES", 700)
    monkeypatch.setattr(texts, "LARGE_BYTES", 1_500)
    monkeypatch.setattr(assembly, "SAVE_TOKENS", 500)
    monkeypatch.setattr(encoded_block, "COPY_TOKENS", 300)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


def without_counts(made: dict[str, bytes] | str) -> dict[str, bytes] | str:
    if isinstance(made, str):
        return made
    return made | {"manifest.json": re.sub(rb'"dropped": {[^}]*}', b"", made["manifest.json"])}


@pytest.mark.parametrize("seed", range(8))
def test_the_folder_does_not_depend_on_borders_or_workers(
    seed: int, tmp_path: Path, tokenizer: str, request: pytest.FixtureRequest
) -> None:
    documents = mixed_source(tmp_path / "source", seed)
    fraction = [0, 0.001, 0.2, 1][seed % 4]

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
    # The nulls behind the last document are counted as far as its chunk was read.
    assert without_counts(made("tiny-limited", workers=3, max_tokens=900)) == without_counts(whole[1])
    if isinstance(whole[0], dict):
        assert tokens_of(DataFolder.open(tmp_path / "tiny")) == expected_split(documents, fraction, TOKENIZER)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("fraction", [0.1, 0.0, 1.0])
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
    assert tokens_of(DataFolder.open(tmp_path / "out")) == expected_split([text], fraction, TOKENIZER)
    assert sum(manifest.text_bytes.values()) == len(text.encode())


def test_filters_say_which_documents_to_leave_out(tmp_path: Path, tokenizer: str, tiny_sizes: None) -> None:
    documents = [f"Text {n}. " + "The river remembers. " * (n % 5 * 30) for n in range(60)]
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    numbers: dict[str, list[int]] = {}

    def even(unit: str, first: int, array: Any) -> dict[int, str]:
        numbers.setdefault(unit, []).extend(range(first, first + len(array)))
        return {n: "even" for n, text in enumerate(array.to_pylist()) if int(text.split()[1][:-1]) % 2 == 0}

    manifest = prepare(
        str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "out", filters=(even,), workers=1, val_fraction=0
    )
    small = [n for n, text in enumerate(documents) if len(text) < 1_500]
    assert manifest.dropped == {"even": sum(n % 2 == 0 for n in small)}
    folder = DataFolder.open(tmp_path / "out")
    kept = [folder.tokenizer.decode(d) for split in ("train", "val") for d in folder.split(split).documents()]
    assert sorted(kept) == sorted(text for n, text in enumerate(documents) if n % 2 or n not in small)
    assert sum(map(len, numbers.values())) == len(small)
    assert all(found == sorted(set(found)) for found in numbers.values())


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


def test_documents_with_nul_characters_are_counted(tmp_path: Path, tokenizer: str) -> None:
    """In JSON and Parquet they are valid, and mostly UTF-16 that was taken for another encoding."""
    damaged = "words".encode("utf-16-le").decode()
    rows = [damaged, "good words", "end\0", *make_texts(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        made = prepare(str(tmp_path / name), tokenizer, tmp_path / f"out {name}")
        assert made.flagged == {blocks.HOLDS_NUL: 2}
