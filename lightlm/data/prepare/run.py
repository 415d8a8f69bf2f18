"""Text to token shards: read a source, tokenize it, split it, and write a data folder that appears complete.

    source.units() -> blocks_of -> engine: encode_block -> encoded blocks -> Assembly -> shards -> manifest, rename

Blocks are encoded anywhere and in any order, and assembled in theirs. Until it is complete, everything is in
`.<name>.partial` (see `lightlm.data.prepare.workspace`), and the same command resumes after a kill.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lightlm import __version__
from lightlm.data.chat.conversation import CHAT, ChatColumns, contents_of
from lightlm.data.coverage import MOST_LOST, loss_shares
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.assembly import SPLIT_RULE, Assembly
from lightlm.data.prepare.blocks import BLANK, Block, DocumentFilter, Job, blocks_of
from lightlm.data.prepare.conversations import ChatTokenizer
from lightlm.data.prepare.encoded_block import EncodedBlock, LeftOut
from lightlm.data.prepare.encoders import AUTO, TOKENIZERS, Encoder, EncoderError, choose_encoder
from lightlm.data.prepare.executors import Engine, ThreadEngine, read_or_encode
from lightlm.data.prepare.options import SHARD_TOKENS, Options, defaults
from lightlm.data.prepare.selection import Selector
from lightlm.data.prepare.workspace import Setting, Workspace, different_settings
from lightlm.data.select.decontamination import Decontaminator
from lightlm.data.select.deduplication import Mode
from lightlm.data.select.filters import Filter
from lightlm.data.shards import MASK_SUFFIX, ChatData, Manifest, TrainOn, token_dtype
from lightlm.data.sources.base import ChangedError, Source, at_revision, check_unchanged, file_counts
from lightlm.data.sources.hub.client import download_tokenizer
from lightlm.data.sources.registry import open_source
from lightlm.data.sources.sample import training_sample
from lightlm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lightlm.data.tokenizer.folder import DEFINITION, MANIFEST, SETTINGS
from lightlm.data.tokenizer.named import requested_vocab_size, tokenizer_settings
from lightlm.data.top_tokens import TEACHER_FOLDER
from lightlm.errors import DataError, UsageError
from lightlm.files import explain_disk_errors, names_in, refuse_working_folder, restore_folder, write_text
from lightlm.limits import cores

OWN_FILES = (MANIFEST, DEFINITION, SETTINGS, TEACHER_FOLDER)  # of a data folder, beside its shards
JUDGED = 10_000_000  # characters and tokens after which a tokenizer that loses text is refused, before the end
MAX_DEFAULT_WORKERS = 8  # each takes about 80 MB of memory

TRAINING_TOKENIZER, TOKENIZING = "training the tokenizer", "tokenizing"


@dataclass(frozen=True)
class Progress:
    """The progress of a preparation; counts restart in each phase.

    `target_tokens` is `max_tokens`. `done` is the finished share of the source, if its size is known. `message` is for
    the user, once.
    """

    phase: str
    documents: int
    text_bytes: int
    tokens: int
    target_tokens: int | None
    done: float | None = None
    message: str | None = None


ProgressCallback = Callable[[Progress], None]


def prepare(
    source: Source | str,
    tokenizer_spec: str | None,
    out: str | os.PathLike[str],
    *,
    text_column: str = "text",
    max_tokens: int | None = None,
    val_fraction: float | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    skip_bad: bool = False,
    encoder: str = AUTO,
    filters: tuple[DocumentFilter, ...] = (),
    dedup: Mode | None = None,
    decontaminate: Decontaminator | None = None,
    filter: Filter | None = None,
    end_of_text: str | None = None,
    train_on: TrainOn = "assistant",
    chat_template: str | None = None,
    engine: Engine | None = None,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Tokenize a source into the data folder `out`, and return its manifest.

    Args:
        source: a source, or an argument of `open_source` (then `text_column` is the column to read).
        tokenizer_spec: `train:N`, or an argument of `load_tokenizer`; None is the source's default (GPT-2's).
        max_tokens: stop after the document that reaches this many tokens, both splits together.
        val_fraction: the share of documents for validation (see `assembly.SPLIT_RULE`); 0 for no validation split,
            1 for data that models are only scored on; None is the source's default (0.005).
        workers: threads of the default engine; by default one per core, at most `MAX_DEFAULT_WORKERS`.
        overwrite: replace a finished folder; it stays in place until the new one is complete.
        skip_bad: leave out what cannot be read, and count and list it in the manifest.
        encoder: `auto` (gigatoken where it can be used), `gigatoken` or `tokenizers`; the ids are the same.
        filters: decide which documents to leave out; the manifest counts them by cause.
        dedup: leave out documents that repeat an earlier one: `exact`, or `near`, see `select.deduplication`.
        decontaminate: leave out, or list, documents that share 13 words in a row with evaluation sets.
        filter: read only the records that it keeps, if `source` is a name; the filter of a `Source` that has one.
        end_of_text: the token after each document; None is what the files of the tokenizer name, or a known name (see
            `Tokenizer.read`). Of a tokenizer that is trained, it is the token's characters.
        train_on: of conversations (`text_column` is then a `ChatColumns`), the tokens to train on: those of the
            assistant with the end of each turn, those of its last turn, or all.
        chat_template: in place of the tokenizer's; None is that one, else ChatML.
        engine: runs the blocks; threads of this process by default.
        progress: called after each few megabytes of text.

    Leaves a folder with the same settings as it is: the result has `already_prepared` set. Resumes an interrupted
    preparation.

    Raises:
        UsageError: an argument is out of its range, or the folder to write is or holds the working directory.
        DataError: the source or the tokenizer cannot be read, the source or the train split is empty, `out` holds
            other files or cannot be written, or the encoder is wrong.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least 1 is needed")
    if isinstance(source, str):
        if isinstance(text_column, ChatColumns):
            text_column = ChatColumns(text_column, train_on)
        source = open_source(source, text_column, filter)
    if getattr(source, "holds_conversations", False) and not isinstance(text_column, ChatColumns):
        text_column = ChatColumns(CHAT)
    default_tokenizer, default_fraction = defaults(source)
    options = Options(
        tokenizer_spec or default_tokenizer, text_column, max_tokens,
        default_fraction if val_fraction is None else val_fraction, shard_tokens, skip_bad, encoder, filters, dedup,
        decontaminate, filter, end_of_text, train_on if isinstance(text_column, ChatColumns) else None, chat_template,
    )  # fmt: skip
    options.check()
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # the threads of `tokenizers`
    workers = workers or min(cores(), MAX_DEFAULT_WORKERS)
    target = Path(os.path.abspath(out)).resolve()
    if not target.name:
        raise UsageError(f"--out {target}: name a folder inside it")
    settings = options.settings(source)
    with explain_disk_errors(target):
        restore_folder(target)
        existing = _existing(target, settings, overwrite)
        workspace = Workspace(target)
        if existing is not None:
            workspace.clear()
            return existing
        refuse_working_folder(target)
        with workspace.locked():
            existing = _existing(target, settings, overwrite)  # another process may have finished it before the lock
            if existing is not None:
                return existing
            preparation = _Preparation(source, options, workspace, engine or ThreadEngine(workers), progress)
            return preparation.run(settings, overwrite)


def _existing(target: Path, settings: dict[str, Setting], overwrite: bool) -> Manifest | None:
    """Return the manifest of a folder prepared with these settings; None if `target` is free to write.

    Raises DataError where it holds anything else.
    """
    if not target.exists():
        return None
    if not target.is_dir() or target.is_mount():
        raise DataError(f"{target} is a file or a mount point, which cannot be replaced; name a folder with --out")
    names = names_in(target)
    foreign = [name for name in names if not (name in OWN_FILES or name.endswith((".bin", MASK_SUFFIX)))]
    if not names:
        return None
    if "manifest.json" not in names or (overwrite and foreign):
        raise DataError(
            f"{target} holds other files ({(foreign or names)[0]}), which would be lost; choose another folder with "
            "--out"
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


class _Preparation:
    """One preparation, new or resumed."""

    def __init__(
        self, source: Source, options: Options, workspace: Workspace, engine: Engine, progress: ProgressCallback | None
    ) -> None:
        self._source, self._options, self._workspace, self._engine = source, options, workspace, engine
        self._progress = progress or (lambda _: None)
        self._lock = threading.Lock()
        self._counts = [0, 0, 0]  # documents, bytes of text, tokens
        self._done_bytes = 0
        self._source_bytes: int | None = None

    def run(self, settings: dict[str, Setting], overwrite: bool) -> Manifest:
        workspace = self._workspace
        self._source = at_revision(self._source, workspace.open(settings, overwrite=overwrite))
        try:
            self._source_bytes = getattr(self._source, "size", None)
            encoder = self._encoder()
            workspace.save_revision(self._source.revision)
            manifest = self._assemble(encoder, settings)
            write_text(workspace.folder / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
            workspace.finish()
            return manifest
        except BaseException as error:
            if isinstance(error, _FinalError | ChangedError) or not workspace.worth_keeping:
                workspace.discard()
            elif isinstance(error, DataError) and not isinstance(error, UsageError | EncoderError):
                message = str(error).removesuffix(".")
                error.args = (f"{message}. Progress is saved. Rerun the same command to resume.",)
            raise

    def _encoder(self) -> Encoder:
        """Return the encoder of the tokenizer.json in the folder, which a new preparation makes."""
        options, definition = self._options, self._workspace.folder / "tokenizer.json"
        if not definition.is_file():
            vocab_size = requested_vocab_size(options.tokenizer)
            if vocab_size is None:
                # The source first: if both need the network, its message has the solution for both.
                next(self._source.units(), None)
                tokenizer = load_tokenizer(options.tokenizer, download_tokenizer, options.end_of_text)
            else:

                def report(documents: int, characters: int) -> None:
                    self._progress(Progress(TRAINING_TOKENIZER, documents, characters, 0, None))

                sample = training_sample(self._source.units(), report, skip_bad=options.skip_bad)
                if options.train_on is not None:
                    sample = map(contents_of, sample)
                tokenizer = train_tokenizer(sample, vocab_size, options.end_of_text)
            if options.train_on is not None:
                tokenizer = self._with_template(tokenizer)
            self._workspace.save_end_of_text(tokenizer.end_of_text_id)
            tokenizer.save(definition)
        wanted = options.encoder if options.train_on is None else TOKENIZERS
        encoder, reason = choose_encoder(wanted, definition, self._workspace.end_of_text_id)
        if reason is not None:
            message = f"Encoding with tokenizers, which is slow: gigatoken cannot be used ({reason})."
            self._progress(Progress(TOKENIZING, 0, 0, 0, options.max_tokens, message=message))
        return encoder

    def _with_template(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer with the special tokens of its chat template, which the folder then holds."""
        spec = self._options.tokenizer
        settings = {} if requested_vocab_size(spec) is not None else tokenizer_settings(spec, download_tokenizer)
        chat = ChatTokenizer.of(tokenizer, settings, self._options.chat_template)
        chat.save(self._workspace.folder)
        self._workspace.save_chat(chat.origin, chat.added)
        return chat.tokenizer

    def _assemble(self, encoder: Encoder, settings: dict[str, Setting]) -> Manifest:
        workspace, options, tokenizer = self._workspace, self._options, encoder.tokenizer
        job = Job(
            folder=workspace.blocks,
            tokenizer=workspace.folder / "tokenizer.json",
            encoder=encoder.name,
            end_of_text_id=tokenizer.end_of_text_id,
            val_fraction=options.val_fraction,
            skip_bad=options.skip_bad,
            filters=(*options.filters, *([options.decontaminate] if options.decontaminate else [])),
            train_on=options.train_on,
        )
        assembly = Assembly(
            workspace.folder, workspace.state, job.folder, tokenizer, options.val_fraction, options.shard_tokens,
            conversations=options.train_on is not None,
        )  # fmt: skip
        state = assembly.state
        self._counts = [state.documents, sum(assembly.text_bytes.values()), state.tokens]
        with contextlib.closing(assembly):
            blocks = self._encoded(assembly, job)
            if options.dedup is not None:
                blocks = self._selected(options.dedup, state.blocks, job, tokenizer)
            with contextlib.closing(blocks):
                for encoded in blocks:
                    assembly.add(encoded)
                    if sum(state.lost.values()) >= JUDGED:
                        _refuse_losses(state.lost)
            _refuse_losses(state.lost)
            assembly.finish()
        self._check(assembly)
        check_unchanged(self._source)
        return self._manifest(assembly, tokenizer, settings)

    def _manifest(self, assembly: Assembly, tokenizer: Tokenizer, settings: dict[str, Setting]) -> Manifest:
        """Return the description of the folder, which an assembly has written."""
        source, options, state = self._source, self._options, assembly.state
        files, chat = file_counts(source), None
        if options.train_on is not None:
            template, added = self._workspace.chat
            chat = ChatData(
                train_on=options.train_on, template=template, added_tokens=added, masks=assembly.masks,
                trained_tokens=assembly.trained_tokens,
            )  # fmt: skip
        return Manifest(
            source=source.spec,
            description=source.description,
            revision=source.revision,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
            end_of_text=tokenizer.end_of_text,
            shards=assembly.shards,
            split_rule=SPLIT_RULE,
            text_bytes=assembly.text_bytes,
            skipped_documents=state.dropped.get(BLANK, 0),
            **state.model_dump(include=set(LeftOut.model_fields)),
            evaluation_sets=options.decontaminate.coverage if options.decontaminate is not None else {},
            files_read=files.read,
            files_left_out=files.left_out,
            unigram=assembly.unigram(),
            chat=chat,
            lightlm_version=__version__,
            settings=settings,
        )

    def _encoded(self, assembly: Assembly, job: Job) -> Generator[EncodedBlock, None, None]:
        """Yield the blocks after those in the shards, encoded, up to `max_tokens`."""
        limit, tokens = self._options.max_tokens, assembly.state.tokens
        if limit is not None and tokens >= limit:
            return
        running: dict[int, Block] = {}
        # A block needs no more than that either, and what follows is not read: it may be large, or broken.
        blocks = (replace(block, limit=limit) for block in self._blocks(assembly.state.blocks, running))
        with contextlib.closing(self._engine(job, blocks, self._report)) as engine:
            for encoded in engine:
                block = running.pop(encoded.number)
                self._done_bytes += block.size
                if limit is not None and tokens + encoded.total_tokens >= limit:
                    yield read_or_encode(job, replace(block, limit=limit - tokens))
                    return
                tokens += encoded.total_tokens
                yield encoded

    def _selected(self, dedup: Mode, done: int, job: Job, tokenizer: Tokenizer) -> Generator[EncodedBlock, None, None]:
        """Yield encoded blocks of the documents that stay."""
        selector = Selector(self._workspace.work, dedup, self._options.max_tokens, done)
        running: dict[int, Block] = {}

        def report(documents: int, text_bytes: int, tokens: int) -> None:
            self._report(documents, text_bytes, 0)  # `max_tokens` counts the tokens that stay

        blocks, dtype = self._blocks(done, running), token_dtype(tokenizer.vocab_size)
        with contextlib.closing(selector.select(blocks, self._engine, job, report, dtype)) as selected:
            for encoded in selected:
                self._done_bytes += running.pop(encoded.number).size
                self._report(0, 0, encoded.total_tokens)
                yield encoded

    def _blocks(self, done: int, running: dict[int, Block]) -> Iterator[Block]:
        """Yield the blocks after the first `done`, which this process skips, and add them to `running`."""
        for block in blocks_of(self._source.units()):
            if block.number < done:
                self._done_bytes += block.size
                continue
            if done and block.number == done:
                self._report(0, 0, 0)  # where this process resumes
            running[block.number] = block
            yield block

    def _report(self, documents: int, text_bytes: int, tokens: int) -> None:
        with self._lock:
            documents, text_bytes, tokens = self._counts = [
                total + more for total, more in zip(self._counts, (documents, text_bytes, tokens), strict=True)
            ]
            done = min(1.0, self._done_bytes / self._source_bytes) if self._source_bytes else None
            self._progress(Progress(TOKENIZING, documents, text_bytes, tokens, self._options.max_tokens, done))

    def _check(self, assembly: Assembly) -> None:
        """Raise DataError where there is nothing to train on."""
        splits = {entry.split for entry in assembly.shards}
        if "val" in splits and "train" not in splits and self._options.val_fraction < 1:
            raise _FinalError(
                f"Every document of {self._source.spec} falls into validation at --val-fraction "
                f"{self._options.val_fraction} (a hash of its text decides), and none is left to train on; choose a "
                "smaller fraction, or split the text into more documents, such as a file per chapter. --val-fraction 1 "
                "is for data that models are only scored on."
            )
        if not splits:
            causes = ", ".join(f"{count} {cause}" for cause, count in assembly.state.dropped.items())
            left_out = f" ({causes} documents were left out)" if causes else ""
            raise _FinalError(f"{self._source.spec} holds no text{left_out}; nothing was written.")


def _refuse_losses(lost: dict[str, int]) -> None:
    """Raise DataError where the tokenizer cannot represent more of the text than a small share."""
    for what, share in loss_shares(lost).items():
        if share > MOST_LOST:
            raise _FinalError(
                f"The tokenizer does not know this text: {share:.1%} {what} (at most {MOST_LOST:.0%} may be lost). "
                "That text would be missing from the data, and scores per byte would look better than they are. Use a "
                "tokenizer that knows it, for example --tokenizer train:8192."
            )


class _FinalError(DataError):
    """The source and the settings do not fit, however often the command runs."""
