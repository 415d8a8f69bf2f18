"""Pieces in their order, assembled into shards; can be stopped at any instant and gone on with.

Every so often what has been assembled is forced to the disk, a state says how far it goes, and the pieces that it
came from are deleted. So a corpus needs room for its shards and a little more, and a kill costs the pieces that were
being made, and a moment's copying.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from lightlm.data.prepare.encoded_block import Record, piece_path, remove_piece
from lightlm.data.prepare.splitting import Candidate, Holder, Span
from lightlm.data.prepare.statistics import cross_entropy
from lightlm.data.prepare.writer import SplitWriter, WriterState
from lightlm.data.shards import SPLITS, ShardEntry, Split, UnigramEntropy, token_dtype
from lightlm.data.tokenizer import Tokenizer
from lightlm.files import sync_file, write_bytes

SAVE_TOKENS = 50_000_000  # between two states: a fifth of a second of copying, 100 MB of pieces kept
COPY_TOKENS = 4_000_000
LISTED = 1_000  # messages about skipped records that the manifest keeps


class AssemblyState(BaseModel):
    """How far the assembly has come: `blocks` are in the shards up to what the writers' states say.

    `source_documents` and `source_tokens` are by the number of a mixture's source.
    """

    blocks: int = 0
    documents: int = 0
    tokens: int = 0
    source_documents: dict[int, int] = {}
    source_tokens: dict[int, int] = {}
    held: Candidate | None = None
    validated: bool
    writers: dict[Split, WriterState]
    dropped: dict[str, int] = {}
    bad: list[str] = []
    flagged: dict[str, int] = {}
    listed: list[str] = []


class Assembly:
    """Appends the pieces in `pieces` to the shards in `folder`, one after the other; its state is in `work`."""

    def __init__(
        self, folder: Path, work: Path, pieces: Path, tokenizer: Tokenizer, val_fraction: float, shard_tokens: int
    ) -> None:
        """Goes on from the state in `work`, if there is one. Raises OSError."""
        self._work, self._pieces, self._dtype = work, pieces, token_dtype(tokenizer.vocab_size)
        self.state, counts = self._load(tokenizer.vocab_size, val_fraction)
        self._holder = Holder(self.state.held, validated=self.state.validated)
        self._writers = {
            split: SplitWriter(
                folder,
                split,
                self._dtype,
                tokenizer.end_of_text_id,
                shard_tokens,
                self.state.writers[split],
                counts[number],
            )
            for number, split in enumerate(SPLITS)
        }
        self._unsaved: list[int] = []  # blocks that are assembled and whose pieces are still there
        self._unsaved_tokens = 0

    def add(self, record: Record) -> None:
        """Append the piece of the next block."""
        state, tokens = self.state, record.tokens["train"]
        for span in self._holder.train_spans(record.number, tokens, record.minima, record.border):
            self._copy(span, "train", "train")
        self._copy(Span(block=record.number, start=0, tokens=record.tokens["val"]), "val", "val")
        for split in SPLITS:
            self._writers[split].state.text_bytes += record.text_bytes[split]
        state.dropped = dict(sorted((Counter(state.dropped) + Counter(record.dropped)).items()))
        state.bad += record.bad[: LISTED - len(state.bad)]
        state.flagged = dict(sorted((Counter(state.flagged) + Counter(record.flagged)).items()))
        state.listed += record.listed[: LISTED - len(state.listed)]
        state.blocks, state.documents = record.number + 1, state.documents + record.documents
        state.tokens += record.total_tokens
        if record.source is not None:
            for by_source, count in (
                (state.source_documents, record.documents),
                (state.source_tokens, record.total_tokens),
            ):
                by_source[record.source] = by_source.get(record.source, 0) + count
        self._unsaved.append(record.number)
        self._unsaved_tokens += record.total_tokens
        if self._unsaved_tokens >= SAVE_TOKENS:
            self.save()

    def hold_nothing_back(self) -> None:
        """For a source of one document: no other may come."""
        self._holder.validated = True

    @property
    def text_bytes(self) -> dict[Split, int]:
        """Bytes of text by split."""
        return {split: self._writers[split].state.text_bytes for split in SPLITS}

    @property
    def shards(self) -> list[ShardEntry]:
        """The finished shards, train first."""
        return [entry for split in SPLITS for entry in self._writers[split].state.entries]

    def finish(self) -> None:
        """Append the document held back, as validation, and close the shards."""
        held = self._holder.held
        if held is not None:
            self._copy(Span(block=held.block, start=held.start, tokens=held.tokens), "train", "val")
            self._writers["train"].state.text_bytes -= held.text_bytes
            self._writers["val"].state.text_bytes += held.text_bytes
        for writer in self._writers.values():
            writer.close()

    def save(self) -> None:
        """Make what is assembled durable, and delete the pieces that are no longer needed."""
        for writer in self._writers.values():
            writer.flush()
        held = self._holder.held
        self.state.held, self.state.validated = held, self._holder.validated
        if held is not None:
            sync_file(piece_path(self._pieces, held.block, "train"))
        np.save(self._work / "counts.partial.npy", np.stack([self._writers[split].token_counts for split in SPLITS]))
        sync_file(self._work / "counts.partial.npy")
        os.replace(self._work / "counts.partial.npy", self._counts_path(self.state.blocks))
        write_bytes(self._work / "state.json", self.state.model_dump_json().encode())
        kept = [] if held is None else [held.block]
        for block in self._unsaved:
            if block not in kept:
                remove_piece(self._pieces, block)
        self._unsaved = [block for block in self._unsaved if block in kept]
        for path in self._work.glob("counts.*.npy"):
            if path != self._counts_path(self.state.blocks):
                path.unlink()
        self._unsaved_tokens = 0

    def abandon(self) -> None:
        """Close the open files."""
        for writer in self._writers.values():
            writer.abandon()

    def unigram(self) -> UnigramEntropy | None:
        """The unigram baseline, where there is a validation split."""
        train, val = (self._writers[split] for split in SPLITS)
        if not val.state.text_bytes:
            return None
        return cross_entropy(train.token_counts, val.token_counts, val.state.text_bytes)

    def _load(self, vocab_size: int, val_fraction: float) -> tuple[AssemblyState, np.ndarray]:
        path = self._work / "state.json"
        if path.is_file():
            state = AssemblyState.model_validate_json(path.read_bytes())
            return state, np.load(self._counts_path(state.blocks))
        writers = {split: WriterState() for split in SPLITS}
        # A fraction of zero asks for no validation split at all: no document is held back for it.
        state = AssemblyState(validated=val_fraction == 0, writers=writers)
        return state, np.zeros((len(SPLITS), vocab_size), np.int64)

    def _counts_path(self, blocks: int) -> Path:
        return self._work / f"counts.{blocks}.npy"

    def _copy(self, span: Span, source: Split, target: Split) -> None:
        """Append consecutive tokens of a piece to a split."""
        if not span.tokens:
            return
        with piece_path(self._pieces, span.block, source).open("rb") as file:
            file.seek(span.start * self._dtype.itemsize)
            for done in range(0, span.tokens, COPY_TOKENS):
                count = min(COPY_TOKENS, span.tokens - done)
                self._writers[target].add(np.fromfile(file, self._dtype, count))
