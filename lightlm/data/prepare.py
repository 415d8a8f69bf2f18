"""Text to token shards: read a source, tokenize it, split it, and write a data folder that appears whole."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightlm import __version__
from lightlm.data.shards import (
    SPLITS,
    DataFolder,
    Manifest,
    Split,
    UnigramEntropy,
    token_dtype,
)
from lightlm.data.sources import Source, open_source
from lightlm.data.splitting import SPLIT_RULE, Document, Splitter, cut_near_end
from lightlm.data.statistics import cross_entropy
from lightlm.data.tokenizer import Tokenizer, load_tokenizer, requested_vocab_size, train_tokenizer
from lightlm.data.writer import SplitWriter
from lightlm.errors import DataError, UsageError
from lightlm.files import new_folder, write_text

SHARD_TOKENS = 100_000_000  # 200 MB a shard, the size that llm.c and modded-nanogpt use

# Texts are tokenized together until they make this many characters or documents: enough to keep every core busy
# (the tokenizer's threads share out documents), and some 100 MB of memory.
CHUNK_CHARACTERS = 4_000_000
CHUNK_DOCUMENTS = 2_000

# A tokenizer is trained on the first documents, at most 1M characters of each, up to 32M characters in all: merges
# hardly change beyond, and training takes seconds.
SAMPLE_CHARACTERS = 32_000_000
SAMPLE_DOCUMENT_CHARACTERS = 1_000_000

TRAINING_TOKENIZER, TOKENIZING = "training the tokenizer", "tokenizing"


@dataclass(frozen=True)
class Progress:
    """How far a preparation has come; counts start again in each phase. `target_tokens` is `max_tokens`."""

    phase: str
    documents: int
    text_bytes: int
    tokens: int
    target_tokens: int | None


ProgressCallback = Callable[[Progress], None]


def prepare(
    source: Source | str,
    tokenizer_spec: str,
    out: str | os.PathLike[str],
    *,
    text_column: str = "text",
    max_tokens: int | None = None,
    val_fraction: float = 0.005,
    workers: int | None = None,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Tokenize a source into the data folder `out`, and return its manifest.

    Args:
        source: a source, or what `open_source` takes (then `text_column` is the column to read).
        tokenizer_spec: `train:N`, or what `load_tokenizer` takes.
        max_tokens: stop after the document that reaches this many tokens, both splits together.
        val_fraction: the share of documents for validation (see `splitting.SPLIT_RULE`); 0 for no validation split.
        workers: threads that tokenize; all cores by default. The first tokenization in a process fixes it.
        overwrite: replace a finished folder; it stays in place until the new one is complete.
        progress: called after each chunk of documents.

    A folder already prepared with the same settings is left alone: the result has `already_prepared` set.

    Raises:
        UsageError: an argument is out of its range.
        DataError: the source or the tokenizer cannot be read, the source is empty, the train split would be, or
            `out` holds something else.
    """
    _check_arguments(max_tokens, val_fraction, workers, shard_tokens)
    requested_vocab_size(tokenizer_spec)
    if isinstance(source, str):
        source = open_source(source, text_column)
    target = Path(os.path.abspath(out))
    settings: dict[str, str | int | float | None] = {
        "source": source.spec,
        "content": source.fingerprint,
        "tokenizer": _tokenizer_identity(tokenizer_spec),
        "text_column": text_column,
        "max_tokens": max_tokens,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    existing = _existing(target, settings, overwrite)
    if existing is not None:
        return existing
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    report = progress or (lambda _: None)
    with new_folder(target, overwrite=True) as folder:
        tokenizer = _tokenizer(tokenizer_spec, source, report)
        tokenizer.save(folder / "tokenizer.json")
        written = _write_splits(folder, source, tokenizer, max_tokens, val_fraction, shard_tokens, report)
        manifest = _manifest(source, tokenizer, written, settings)
        write_text(folder / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
    return manifest


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Check a data folder completely, checksums included. Raises DataError naming the first thing that does not fit."""
    folder = DataFolder.open(path)
    folder.verify()
    return folder.manifest


def _check_arguments(max_tokens: int | None, val_fraction: float, workers: int | None, shard_tokens: int) -> None:
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction}: a number from 0 (no validation split) to below 1 is needed")
    for option, value in (("--max-tokens", max_tokens), ("--workers", workers), ("shard_tokens", shard_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: at least 1 is needed")


def _tokenizer_identity(spec: str) -> str:
    """What the settings say of the tokenizer: a local file's hash, since its path says nothing; else the spec."""
    path = Path(spec) / "tokenizer.json" if Path(spec).is_dir() else Path(spec)
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else spec


def _existing(target: Path, settings: dict[str, str | int | float | None], overwrite: bool) -> Manifest | None:
    """The manifest of a folder prepared with these settings; None where `target` is free to write.

    Raises DataError where it holds anything else.
    """
    if not target.exists():
        return None
    if not target.is_dir():
        raise DataError(f"{target} is a file; choose another folder with --out")
    names = sorted(path.name for path in target.iterdir())
    foreign = [name for name in names if not (name in {"manifest.json", "tokenizer.json"} or name.endswith(".bin"))]
    if not names:
        return None
    if "manifest.json" not in names or (overwrite and foreign):
        culprit = foreign[0] if foreign else names[0]
        raise DataError(
            f"{target} holds other files ({culprit}), which would be lost; choose another folder with --out"
        )
    if overwrite:
        return None
    manifest = DataFolder.open(target).manifest
    changed = [key for key, value in settings.items() if manifest.settings.get(key) != value]
    if changed:
        differences = "; ".join(f"{key}: {manifest.settings.get(key)} there, {settings[key]} now" for key in changed)
        raise DataError(
            f"{target} was prepared with other settings ({differences}). "
            "Use --overwrite to prepare it again, or --out for another folder."
        )
    return manifest.model_copy(update={"already_prepared": True})


def _texts(source: Source) -> Iterator[str]:
    for unit in source.units():
        yield from unit.read()


def _tokenizer(spec: str, source: Source, report: ProgressCallback) -> Tokenizer:
    vocab_size = requested_vocab_size(spec)
    if vocab_size is None:
        # The source first: where both need the network, its message tells the way out of both.
        next(source.units(), None)
        return load_tokenizer(spec)
    return train_tokenizer(_sample(source, report), vocab_size)


def _sample(source: Source, report: ProgressCallback) -> Iterator[str]:
    """The beginnings of the first documents, for training a tokenizer; validation documents are among them."""
    total = reported = 0
    for documents, text in enumerate(_texts(source), start=1):
        piece = text[: min(SAMPLE_DOCUMENT_CHARACTERS, SAMPLE_CHARACTERS - total)]
        total += len(piece)
        if total - reported >= CHUNK_CHARACTERS:
            reported = total
            report(Progress(TRAINING_TOKENIZER, documents, total, 0, None))
        yield piece
        if total >= SAMPLE_CHARACTERS:
            return


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@dataclass
class _Written:
    """What went into the shards: the writers, closed, and how many blank documents were left out."""

    writers: dict[Split, SplitWriter]
    skipped: int


def _write_splits(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    max_tokens: int | None,
    val_fraction: float,
    shard_tokens: int,
    report: ProgressCallback,
) -> _Written:
    """Tokenize every document into the shards of its split. Raises DataError where there is nothing to train on."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {s: SplitWriter(folder, s, dtype, tokenizer.vocab_size, shard_tokens) for s in SPLITS}
    written = _Written(writers, 0)

    def write(split: Split, document: Document) -> None:
        tokens = np.array([*document.ids, tokenizer.end_of_text_id], dtype=np.int64)
        writers[split].add(tokens, len(document.text.encode()))

    try:
        splitter = Splitter(val_fraction)
        for document in _encoded(source, tokenizer, max_tokens, written, report):
            for split, ready in splitter.route(document):
                write(split, ready)
        for split, ready in splitter.finish():
            write(split, ready)
        if splitter.only_document is not None:
            parts = cut_near_end(splitter.only_document, val_fraction)
            for split, text in zip(SPLITS, parts, strict=True):
                if text:
                    write(split, Document(text, tokenizer.encode(text)))
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    _check_written(source, written, val_fraction)
    return written


def _encoded(
    source: Source, tokenizer: Tokenizer, max_tokens: int | None, written: _Written, report: ProgressCallback
) -> Iterator[Document]:
    """The source's documents with their token ids, up to the one that reaches `max_tokens`; counts the blank ones."""
    documents = text_bytes = tokens = 0
    for chunk in _chunks(_texts(source)):
        texts = [text for text in chunk if text and not text.isspace()]
        written.skipped += len(chunk) - len(texts)
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            yield Document(text, ids)
            documents, text_bytes, tokens = documents + 1, text_bytes + len(text), tokens + len(ids) + 1
            if max_tokens is not None and tokens >= max_tokens:
                break
        report(Progress(TOKENIZING, documents, text_bytes, tokens, max_tokens))
        if max_tokens is not None and tokens >= max_tokens:
            return


def _check_written(source: Source, written: _Written, val_fraction: float) -> None:
    if written.writers["train"].entries:
        return
    if written.writers["val"].entries:
        raise DataError(
            f"Every document of {source.spec} falls into validation at --val-fraction {val_fraction}, and none is left "
            "to train on; choose a smaller fraction."
        )
    blank = f" ({written.skipped} blank documents were left out)" if written.skipped else ""
    raise DataError(f"{source.spec} holds no text{blank}; nothing was written.")


def _manifest(
    source: Source, tokenizer: Tokenizer, written: _Written, settings: dict[str, str | int | float | None]
) -> Manifest:
    writers = written.writers
    train, val = writers["train"], writers["val"]
    unigram: UnigramEntropy | None = None
    if val.text_bytes:
        unigram = cross_entropy(train.token_counts, val.token_counts, val.text_bytes)
    return Manifest(
        source=source.spec,
        description=source.description,
        revision=source.revision,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        shards=[*train.entries, *val.entries],
        split_rule=SPLIT_RULE,
        text_bytes={split: writers[split].text_bytes for split in SPLITS},
        skipped_documents=written.skipped,
        unigram=unigram,
        lightlm_version=__version__,
        settings=settings,
    )
