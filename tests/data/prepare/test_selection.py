"""De-duplication in the pipeline: the folder is that of the documents that stay, however it was made."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightlm.data.folder import DataFolder
from lightlm.data.prepare import assembly, blocks
from lightlm.data.prepare.encoded_block import EncodedBlock
from lightlm.data.prepare.executors import ThreadEngine
from lightlm.data.prepare.run import Progress, prepare
from lightlm.data.select.deduplication import Mode
from lightlm.data.sources.base import Source
from lightlm.data.sources.registry import open_source
from tests.corpus import texts


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is a block, and the assembly's state is saved after each."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(assembly, "SAVE_TOKENS", 1)


def write_files(folder: Path, documents: list[str], files: int = 8) -> Path:
    folder.mkdir(parents=True)
    size = -(-len(documents) // files)
    for number in range(files):
        lines = [json.dumps({"text": text}) + "\n" for text in documents[number * size : (number + 1) * size]]
        (folder / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    source = write_files(tmp_path / "for_tokenizer", texts(100, seed=9))
    prepare(str(source), "train:300", tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer" / "tokenizer.json")


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def documents_of(folder: Path) -> list[str]:
    opened = DataFolder.open(folder)
    splits = [opened.split(split).documents() for split in ("train", "val") if opened.manifest.tokens(split)]
    return [opened.tokenizer.decode(ids) for documents in splits for ids in documents]


def with_repetitions(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Documents among which some repeat; what is left exactly, and what is left of near-duplicates."""
    rng = random.Random(seed)
    originals = [" ".join(f"{word}{n}" for word in text.split()) for n, text in enumerate(texts(40, seed))]
    mixed: list[str] = []
    for text in originals:
        mixed.append(text)
        if rng.random() < 0.3:
            mixed.insert(rng.randint(mixed.index(text) + 1, len(mixed)), text)
        if rng.random() < 0.3:
            mixed.append(f" {text.upper()} !")
    exact = list(dict.fromkeys(mixed))
    return mixed, exact, originals


@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 1e-9])
@pytest.mark.parametrize("mode", ["exact", "near"])
def test_the_folder_is_that_of_the_documents_that_stay(
    mode: str, val_fraction: float, tmp_path: Path, tokenizer: str
) -> None:
    mixed, exact, near = with_repetitions(1)
    kept = exact if mode == "exact" else near
    assert len(mixed) > len(exact) > len(near)
    source = str(write_files(tmp_path / "mixed", mixed))
    made = prepare(source, tokenizer, tmp_path / "out", dedup=mode, val_fraction=val_fraction)
    clean = str(write_files(tmp_path / "clean", kept, 3))
    expected = prepare(clean, tokenizer, tmp_path / "expected", val_fraction=val_fraction)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "expected")
    assert made.text_bytes == expected.text_bytes
    assert made.unigram == expected.unigram
    dropped = {"duplicate": len(mixed) - len(exact), "near-duplicate": len(exact) - len(near)}
    assert made.dropped == {cause: n for cause, n in dropped.items() if mode == "near" or cause == "duplicate"}


def test_max_tokens_counts_what_stays(tmp_path: Path, tokenizer: str) -> None:
    mixed, exact, _ = with_repetitions(2)
    source, clean = write_files(tmp_path / "mixed", mixed), write_files(tmp_path / "clean", exact)
    made = prepare(str(source), tokenizer, tmp_path / "out", dedup="exact", max_tokens=900)
    expected = prepare(str(clean), tokenizer, tmp_path / "expected", max_tokens=900)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "expected")
    assert 900 <= made.tokens("train") + made.tokens("val") < 1_200
    assert made.text_bytes == expected.text_bytes


@pytest.mark.parametrize("max_tokens", [None, 900])
def test_progress_is_what_is_read_and_the_tokens_that_stay(
    max_tokens: int | None, tmp_path: Path, tokenizer: str
) -> None:
    mixed, _, _ = with_repetitions(2)
    reports: list[Progress] = []
    source = str(write_files(tmp_path / "in", mixed))
    options: dict[str, Any] = {
        "dedup": "exact",
        "max_tokens": max_tokens,
        "val_fraction": 0,
        "progress": reports.append,
    }
    made = prepare(source, tokenizer, tmp_path / "out", **options)
    tokens = [report.tokens for report in reports]
    assert tokens[-1] == max(tokens) == made.tokens("train") + made.tokens("val")
    done = [report.done for report in reports if report.done is not None]
    assert done == sorted(done)
    assert done[0] == 0.0
    assert done[-1] == 1.0 if max_tokens is None else 0.0 < done[-1] <= 1.0


def test_a_large_document_repeats_too(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightlm.data.readers import texts as sizes

    monkeypatch.setattr(sizes, "LARGE_BYTES", 500)
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 300)
    large = " ".join(texts(10, seed=4))
    documents = ["one", large, "two", large, large.upper(), "two"]
    made = prepare(
        str(write_files(tmp_path / "in", documents, 2)), tokenizer, tmp_path / "out", dedup="near", val_fraction=0
    )
    assert documents_of(tmp_path / "out") == ["one", large, "two", large.upper()]
    assert made.dropped == {"duplicate": 2}


class InterruptedRunError(Exception):
    pass


class StoppingEngine(ThreadEngine):
    """Fails after so many blocks."""

    def __init__(self, workers: int, blocks: int) -> None:
        super().__init__(workers)
        self._left = blocks

    def __call__(self, *arguments: Any) -> Iterator[EncodedBlock]:
        for record in super().__call__(*arguments):
            self._left -= 1
            if self._left < 0:
                raise InterruptedRunError
            yield record


def run_with_interruptions(source: Source, tokenizer: str, out: Path, seed: int, **options: Any) -> int:
    """Prepare with a failure after every few blocks, until it is done; how many there were."""
    rng, failures = random.Random(seed), 0
    while not (out / "manifest.json").exists():
        engine = StoppingEngine(rng.randint(1, 3), rng.randint(1, 2))
        try:
            prepare(source, tokenizer, out, engine=engine, **options)
        except InterruptedRunError:
            failures += 1
    return failures


@pytest.mark.parametrize("max_tokens", [None, 2_000])
def test_interruptions_and_workers_change_nothing(max_tokens: int | None, tmp_path: Path, tokenizer: str) -> None:
    source = open_source(str(write_files(tmp_path / "in", with_repetitions(3)[0])))
    options: dict[str, Any] = {"dedup": "near", "max_tokens": max_tokens, "val_fraction": 0.05}
    reference = prepare(source, tokenizer, tmp_path / "reference", engine=ThreadEngine(1), **options)
    interruptions = 0
    for seed in range(3):
        out = tmp_path / f"run{seed}"
        interruptions += run_with_interruptions(source, tokenizer, out, seed, **options)
        assert shards_of(out) == shards_of(tmp_path / "reference")
        made = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        assert made == json.loads(reference.model_dump_json())
        assert not (tmp_path / f".run{seed}.partial").exists()
    assert interruptions >= (1 if max_tokens else 5)


@pytest.mark.parametrize("dedup", [None, "exact"])
def test_the_first_report_of_a_resumed_preparation_is_what_is_done(
    dedup: Mode | None, tmp_path: Path, tokenizer: str
) -> None:
    source, out = str(write_files(tmp_path / "in", texts(40))), tmp_path / "out"
    with pytest.raises(InterruptedRunError):
        prepare(source, tokenizer, out, dedup=dedup, engine=StoppingEngine(1, 4))
    reports: list[Progress] = []
    prepare(source, tokenizer, out, dedup=dedup, progress=reports.append)
    assert next(report.done for report in reports if report.message is None) == pytest.approx(0.5, abs=0.1)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, tokenizer: str) -> None:
    from lightlm.errors import DataError

    source = str(write_files(tmp_path / "in", texts(30)))
    assert prepare(source, tokenizer, tmp_path / "out").settings["dedup"] is None
    with pytest.raises(DataError, match="dedup: None there, xxh3_64 now"):
        prepare(source, tokenizer, tmp_path / "out", dedup="exact")
