"""Text to token shards: read a source, tokenize it, split it, and write a data folder that appears whole.

    source.units() -> blocks_of -> engine: encode_block -> pieces on disk -> Assembly -> shards -> manifest, rename

Blocks are encoded anywhere and in any order, and assembled in theirs. Everything stays in `.<name>.partial` (see
`lightlm.data.prepare.workspace`) until it is complete, and the same command goes on from there after a kill.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from lightlm import __version__
from lightlm.data.prepare.assembly import Assembly, AssemblyState
from lightlm.data.prepare.blocks import BLANK, Block, DocumentFilter, Job, blocks_of
from lightlm.data.prepare.encoded_block import Record
from lightlm.data.prepare.encoders import AUTO, EncoderError, choose_encoder, remember
from lightlm.data.prepare.executors import Engine, ThreadEngine, done_or_encoded
from lightlm.data.prepare.mixing.source import MixtureSource
from lightlm.data.prepare.options import SHARD_TOKENS, Options
from lightlm.data.prepare.selection import Selector
from lightlm.data.prepare.splitting import SPLIT_RULE
from lightlm.data.prepare.workspace import Partial, Setting, different_settings
from lightlm.data.select.decontamination import Decontaminator
from lightlm.data.select.deduplication import Mode
from lightlm.data.select.filters import Filter
from lightlm.data.shards import DataFolder, Manifest, MixedSource, token_dtype
from lightlm.data.sources.local import Revisable, Source, open_source
from lightlm.data.sources.sample import training_sample
from lightlm.data.tokenizer import Tokenizer, load_tokenizer, requested_vocab_size, train_tokenizer
from lightlm.errors import DataError, UsageError
from lightlm.files import clear_errors, restore_folder, write_text

MOST_WORKERS = 8  # by default: each takes some 80 MB of memory

TRAINING_TOKENIZER, TOKENIZING = "training the tokenizer", "tokenizing"


@dataclass(frozen=True)
class Progress:
    """How far a preparation has come; counts start again in each phase.

    `target_tokens` is `max_tokens`; `done` is the share of the source that is finished, where its size is known.
    `note` is something to tell the user once.
    """

    phase: str
    documents: int
    text_bytes: int
    tokens: int
    target_tokens: int | None
    done: float | None = None
    note: str | None = None


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
    skip_bad: bool = False,
    encoder: str = AUTO,
    filters: tuple[DocumentFilter, ...] = (),
    dedup: Mode | None = None,
    decontaminate: Decontaminator | None = None,
    filter: Filter | None = None,
    engine: Engine | None = None,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Tokenize a source into the data folder `out`, and return its manifest.

    Args:
        source: a source, or what `open_source` takes (then `text_column` is the column to read).
        tokenizer_spec: `train:N`, or what `load_tokenizer` takes.
        max_tokens: stop after the document that reaches this many tokens, both splits together.
        val_fraction: the share of documents for validation (see `splitting.SPLIT_RULE`); 0 for no validation split.
        workers: threads of the default engine; all cores, but at most `MOST_WORKERS`, by default.
        overwrite: replace a finished folder; it stays in place until the new one is complete.
        skip_bad: leave out what cannot be read, and count and list it in the manifest.
        encoder: `auto` (gigatoken where it can be used), `gigatoken` or `tokenizers`; the ids are the same.
        filters: say which documents to leave out; the manifest counts them by cause.
        dedup: leave out documents that repeat an earlier one: `exact`, or `near`, see `select.deduplication`.
        decontaminate: leave out, or list, documents that share 13 words in a row with evaluation sets.
        filter: with a source given by its name, read only the records that it keeps; with a `Source`, the one it was
            opened with.
        engine: runs the blocks; threads of this process by default.
        progress: called after each few megabytes of text.

    A folder already prepared with the same settings is left alone: the result has `already_prepared` set. A
    preparation that stopped is gone on with.

    Raises:
        UsageError: an argument is out of its range.
        DataError: the source or the tokenizer cannot be read, the source is empty, the train split would be, `out`
            holds something else or cannot be written, or the encoder is wrong.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least 1 is needed")
    options = Options(
        tokenizer_spec, text_column, max_tokens, val_fraction, shard_tokens, skip_bad, encoder, filters, dedup,
        decontaminate, filter,
    )  # fmt: skip
    options.check()
    if isinstance(source, str):
        source = open_source(source, text_column, filter)
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # the threads of `tokenizers`
    workers = workers or min(available_cores(), MOST_WORKERS)
    target = Path(os.path.abspath(out)).resolve()
    if not target.name:
        raise UsageError(f"--out {target}: name a folder inside it")
    settings = options.settings(source)
    with clear_errors(target):
        restore_folder(target)
        existing = _existing(target, settings, overwrite)
        partial = Partial(target)
        if existing is not None:
            partial.clear()
            return existing
        with partial.locked():
            existing = _existing(target, settings, overwrite)  # another process may have finished in the meantime
            if existing is not None:
                return existing
            run = _Run(source, options, partial, engine or ThreadEngine(workers), progress or (lambda _: None))
            return run.run(settings, overwrite)


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Check a data folder completely, checksums included. Raises DataError naming the first thing that does not fit."""
    folder = DataFolder.open(path)
    folder.verify()
    return folder.manifest


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _existing(target: Path, settings: dict[str, Setting], overwrite: bool) -> Manifest | None:
    """The manifest of a folder prepared with these settings; None where `target` is free to write.

    Raises DataError where it holds anything else.
    """
    if not target.exists():
        return None
    if not target.is_dir():
        raise DataError(f"{target} is a file; choose another folder with --out")
    if target.is_mount():
        raise DataError(f"{target} is a mount point, which cannot be replaced; name a folder inside it with --out")
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
    changed = different_settings(manifest.settings, settings)
    if changed:
        raise DataError(
            f"{target} was prepared with other settings ({changed}). "
            "Use --overwrite to prepare it again, or --out for another folder."
        )
    return manifest.model_copy(update={"already_prepared": True})


class _Run:
    """One preparation, begun or gone on with."""

    def __init__(
        self, source: Source, options: Options, partial: Partial, engine: Engine, progress: ProgressCallback
    ) -> None:
        self._source, self._options, self._partial, self._engine = source, options, partial, engine
        self._progress = progress
        self._lock = threading.Lock()
        self._counts = [0, 0, 0]  # documents, bytes of text, tokens
        self._done_bytes = 0
        self._source_bytes: int | None = None

    def run(self, settings: dict[str, Setting], overwrite: bool) -> Manifest:
        partial = self._partial
        self._pin(partial.open(settings, overwrite=overwrite))
        try:
            self._source_bytes = getattr(self._source, "size", None)
            tokenizer = self._tokenizer()
            remember(tokenizer)
            partial.note_revision(self._source.revision)
            manifest = self._assemble(self._job(tokenizer), tokenizer, settings)
            write_text(partial.folder / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
            partial.finish()
            return manifest
        except BaseException as error:
            if isinstance(error, _NothingError) or not partial.worth_keeping:
                partial.discard()
            elif isinstance(error, DataError) and not isinstance(error, UsageError | EncoderError):
                kept = "What is finished is kept: run the same command again to go on from there"
                skip = "" if self._options.skip_bad else ", with --skip-bad to leave out what cannot be read"
                error.args = (f"{str(error).removesuffix('.')}. {kept}{skip}.",)
            raise

    def _pin(self, revision: str | None) -> None:
        """Read the source in the state in which the preparation began."""
        if revision is None:
            return
        if isinstance(self._source, Revisable):  # at once: what is its latest state, only the network could tell
            self._source = self._source.at_revision(revision)
        elif revision != self._source.revision:
            raise DataError(
                f"{self._source.spec} has changed since {self._partial.path} was begun: {revision} then, "
                f"{self._source.revision} now. Use --overwrite to start over."
            )

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, as the process that began the preparation left it."""
        path = self._partial.folder / "tokenizer.json"
        if path.is_file():
            return Tokenizer.from_file(path)
        vocab_size = requested_vocab_size(self._options.tokenizer)
        if vocab_size is None:
            # The source first: where both need the network, its message tells the way out of both.
            next(self._source.units(), None)
            tokenizer = load_tokenizer(self._options.tokenizer)
        else:
            sample = training_sample(self._source.units(), self._report_sample, skip_bad=self._options.skip_bad)
            tokenizer = train_tokenizer(sample, vocab_size)
        tokenizer.save(path)
        return tokenizer

    def _report_sample(self, documents: int, characters: int) -> None:
        self._progress(Progress(TRAINING_TOKENIZER, documents, characters, 0, None))

    def _job(self, tokenizer: Tokenizer) -> Job:
        definition = self._partial.folder / "tokenizer.json"
        encoder, reason = choose_encoder(self._options.encoder, definition, tokenizer.end_of_text_id)
        if reason is not None:
            note = f"Encoding with tokenizers, which is slow: gigatoken cannot be used ({reason})."
            self._progress(Progress(TOKENIZING, 0, 0, 0, self._options.max_tokens, note=note))
        return Job(
            folder=self._partial.pieces,
            tokenizer=definition,
            end_of_text_id=tokenizer.end_of_text_id,
            encoder=encoder,
            val_fraction=self._options.val_fraction,
            skip_bad=self._options.skip_bad,
            filters=self._options.all_filters,
        )

    def _assemble(self, job: Job, tokenizer: Tokenizer, settings: dict[str, Setting]) -> Manifest:
        partial, options = self._partial, self._options
        assembly = Assembly(
            partial.folder, partial.work, partial.pieces, tokenizer, options.val_fraction, options.shard_tokens
        )
        try:
            if options.dedup is not None or isinstance(self._source, MixtureSource):
                self._feed_selected(assembly, job, tokenizer)
            else:
                self._feed(assembly, job)
            assembly.finish()
        finally:
            assembly.abandon()
        self._check(assembly)
        state = assembly.state
        return Manifest(
            source=self._source.spec,
            description=self._source.description,
            revision=self._source.revision,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
            shards=assembly.shards,
            split_rule=SPLIT_RULE,
            text_bytes=assembly.text_bytes,
            skipped_documents=state.dropped.get(BLANK, 0),
            dropped=state.dropped,
            bad=state.bad,
            flagged=state.flagged,
            listed=state.listed,
            evaluation_sets=options.decontaminate.coverage if options.decontaminate is not None else {},
            mixture=self._mixture(state),
            unigram=assembly.unigram(),
            lightlm_version=__version__,
            settings=settings,
        )

    def _mixture(self, state: AssemblyState) -> list[MixedSource]:
        if not isinstance(self._source, MixtureSource):
            return []
        return self._source.reached(state.source_tokens, state.source_documents)

    def _feed(self, assembly: Assembly, job: Job) -> None:
        """Encode the blocks that are still to be done and hand them to the assembly, up to `max_tokens`."""
        limit, state = self._options.max_tokens, assembly.state
        self._counts = [state.documents, sum(assembly.text_bytes.values()), state.tokens]
        waiting: list[tuple[Block, Record]] = []  # while there is one document only, whose fate depends on a second
        documents, tokens = state.documents, state.tokens
        if limit is not None and tokens >= limit:
            return
        blocks, given = self._blocks(state.blocks)
        if state.documents:
            self._report(0, 0, 0)  # where this process begins
        with contextlib.closing(self._engine(job, blocks, self._report)) as records:
            for record in records:
                block = given.pop(record.number)
                if limit is not None and tokens + record.total_tokens >= limit:
                    block = replace(block, limit=limit - tokens)
                    record = done_or_encoded(job, block)
                documents, tokens = documents + record.documents, tokens + record.total_tokens
                waiting.append((block, record))
                self._done_bytes += block.size
                if documents > 1:
                    for _, ready in waiting:
                        assembly.add(ready)
                    waiting = []
                if block.limit is not None:
                    break
        for block, record in waiting:
            if record.documents == 1:
                assembly.hold_nothing_back()
                record = done_or_encoded(job, replace(block, only=True))
            assembly.add(record)

    def _feed_selected(self, assembly: Assembly, job: Job, tokenizer: Tokenizer) -> None:
        """The same where a document's fate depends on others; the only document of a source is not cut here."""
        state, source = assembly.state, self._source
        self._counts = [state.documents, sum(assembly.text_bytes.values()), state.tokens]
        parts = source.parts if isinstance(source, MixtureSource) else [(source, Fraction(1))]
        selector = Selector(
            self._partial.work,
            [blocks_of(part.units()) for part, _ in parts],
            [share for _, share in parts],
            dedup=self._options.dedup,
            max_tokens=self._options.max_tokens,
            done=state.blocks,
        )
        waiting: list[Record] = []  # until there are two documents, as above
        for record in selector.pieces(self._engine, job, self._report, token_dtype(tokenizer.vocab_size)):
            waiting.append(record)
            if state.documents + sum(ready.documents for ready in waiting) > 1:
                for ready in waiting:
                    assembly.add(ready)
                waiting = []
        for ready in waiting:
            if ready.documents:
                assembly.hold_nothing_back()
            assembly.add(ready)

    def _blocks(self, start: int) -> tuple[Iterator[Block], dict[int, Block]]:
        """The blocks from number `start` on, and those that have been given and not been taken back."""
        given: dict[int, Block] = {}

        def give() -> Iterator[Block]:
            for block in blocks_of(self._source.units()):
                if block.number < start:
                    self._done_bytes += block.size
                    continue
                given[block.number] = block
                yield block

        return give(), given

    def _report(self, documents: int, text_bytes: int, tokens: int) -> None:
        with self._lock:
            counts = self._counts
            counts[0], counts[1], counts[2] = counts[0] + documents, counts[1] + text_bytes, counts[2] + tokens
            done = min(1.0, self._done_bytes / self._source_bytes) if self._source_bytes else None
            self._progress(Progress(TOKENIZING, counts[0], counts[1], counts[2], self._options.max_tokens, done))

    def _check(self, assembly: Assembly) -> None:
        """Raises DataError where there is nothing to train on."""
        splits = {entry.split for entry in assembly.shards}
        if "train" in splits:
            return
        if "val" in splits:
            raise _NothingError(
                f"Every document of {self._source.spec} falls into validation at --val-fraction "
                f"{self._options.val_fraction}, and none is left to train on; choose a smaller fraction."
            )
        dropped = assembly.state.dropped
        causes = ", ".join(f"{count} {cause}" for cause, count in dropped.items())
        left_out = f" ({causes} documents were left out)" if causes else ""
        raise _NothingError(f"{self._source.spec} holds no text{left_out}; nothing was written.")


class _NothingError(DataError):
    """The source leaves nothing to train on, however often it is read."""
