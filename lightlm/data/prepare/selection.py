"""Selecting documents after they are encoded, where one's fate depends on others: duplicates and mixtures.

    engine -> raw pieces with a table of their documents -> Selector -> pieces -> Assembly

The selector takes raw pieces in the order of each source, decides which documents stay, puts them in the order of the
mixture, and copies what stays to the pieces that are assembled. Of each it keeps a note, from which a later process
goes on.

A row of a table is a document in the piece's order, uint64: its signature (`deduplication.Signer`), its tokens with
the end-of-text token, its bytes of text.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lightlm.data.prepare.blocks import Block, Job
from lightlm.data.prepare.encoded_block import TABLE, PieceWriter, Record, piece_path, remove_piece
from lightlm.data.prepare.executors import Engine
from lightlm.data.prepare.mixing.schedule import Mixer, Portion, Schedule
from lightlm.data.prepare.places import Places
from lightlm.data.prepare.splitting import KEYS
from lightlm.data.select.deduplication import EXACT_DUPLICATE, KEPT, NEAR_DUPLICATE, Deduplicator, Mode, Signer
from lightlm.data.shards import SPLITS, Split
from lightlm.files import write_bytes

CAUSES = {EXACT_DUPLICATE: "duplicate", NEAR_DUPLICATE: "near-duplicate"}
COPY_TOKENS = 4_000_000


@dataclass(frozen=True)
class Chosen:
    """A raw piece, and for each of its documents the verdict of the `Deduplicator`."""

    block: Block
    record: Record
    rows: np.ndarray
    verdicts: np.ndarray


class Selector:
    """Turns raw pieces into pieces of the documents that stay, numbered from `done` on.

    Args:
        work: where raw pieces and notes are kept.
        sources: for each source its blocks, from its first.
        shares: of the sources in the mixture; of a single source 1.
        done: how many pieces an earlier process has made for good.
    """

    def __init__(
        self,
        work: Path,
        sources: Sequence[Iterator[Block]],
        shares: Sequence[Fraction],
        *,
        dedup: Mode | None,
        max_tokens: int | None,
        done: int,
    ) -> None:
        self._raw, self._notes = work / "raw", work / "notes"
        for folder in (self._raw, self._notes):
            folder.mkdir(exist_ok=True)
        self._signer = Signer(dedup or "exact")
        # A source is searched for repetitions of its own: the order of a mixture follows from what stays.
        self._deduplicators = [Deduplicator(dedup) for _ in sources] if dedup else None
        taken, blocks = [0] * len(sources), [0] * len(sources)
        for number in range(done):
            source, tokens = self._read_note(number)
            taken[source], blocks[source] = taken[source] + tokens, blocks[source] + 1
        numbered = [
            self._numbered(source, iter(part), blocks[source], len(sources)) for source, part in enumerate(sources)
        ]
        self._schedule = Schedule(numbered, shares, taken)
        self._mixer = Mixer[Chosen](shares, max_tokens, taken)
        self._done = done

    def pieces(
        self, engine: Engine, job: Job, report: Callable[[int, int, int], None], dtype: np.dtype[Any]
    ) -> Iterator[Record]:
        """The records of the pieces, which lie in `job.folder`."""
        raw_job = replace(job, folder=self._raw, signer=self._signer)
        portions = self._portions(engine, raw_job, report)
        for number, (portion, limit) in enumerate(self._mixer.arrange(portions, self._schedule.finished), self._done):
            chosen = portion.item
            keep = chosen.verdicts == KEPT if limit is None else _up_to(limit, chosen)
            record = _copy_chosen(portion, keep, self._raw, job, number, dtype)
            self._write_note(number, portion, chosen.rows[keep, :-2])
            remove_piece(self._raw, chosen.record.number)
            yield record

    def _numbered(self, source: int, blocks: Iterator[Block], start: int, sources: int) -> Iterator[Block]:
        for block in blocks:
            if block.number >= start:
                yield replace(block, number=block.number * sources + source)

    def _portions(self, engine: Engine, job: Job, report: Callable[[int, int, int], None]) -> Iterator[Portion[Chosen]]:
        """Raw pieces as the engine gives them, each source's in its order."""
        given: dict[int, tuple[int, Block]] = {}

        def blocks() -> Iterator[Block]:
            for source, block in self._schedule:
                given[block.number] = source, block
                yield block

        for record in engine(job, blocks(), report):
            source, block = given.pop(record.number)
            rows = read_table(self._raw, record.number, self._signer.columns)
            verdicts = np.full(len(rows), KEPT, np.uint8)
            if self._deduplicators is not None:
                verdicts = self._deduplicators[source].decide(rows[:, :-2])
            tokens = int(rows[verdicts == KEPT, -2].sum())
            self._schedule.arrived(source, tokens)
            yield Portion(source, tokens, Chosen(block, record, rows, verdicts))

    def _write_note(self, number: int, portion: Portion[Chosen], kept: np.ndarray) -> None:
        """Keep, durably, where a piece comes from and the signatures in it."""
        header = json.dumps({"source": portion.source, "tokens": portion.tokens}).encode()
        signatures = kept.astype("<u8").tobytes() if self._deduplicators is not None else b""
        write_bytes(self._notes / f"{number:08d}", header + b"\n" + signatures)

    def _read_note(self, number: int) -> tuple[int, int]:
        """The source of a piece and the tokens that stayed of it; its signatures are remembered."""
        header, _, content = (self._notes / f"{number:08d}").read_bytes().partition(b"\n")
        note = json.loads(header)
        if self._deduplicators is not None:
            signatures = np.frombuffer(content, "<u8").reshape(-1, self._signer.columns)
            self._deduplicators[note["source"]].remember(signatures)
        return note["source"], note["tokens"]


def read_table(folder: Path, number: int, columns: int) -> np.ndarray:
    """The table of a piece: uint64 of shape (documents, columns + 2)."""
    path = piece_path(folder, number, TABLE)
    content = np.fromfile(path, "<u8") if path.is_file() else np.zeros(0, np.uint64)
    return content.reshape(-1, columns + 2)


def _copy_chosen(
    portion: Portion[Chosen], keep: np.ndarray, raw: Path, job: Job, number: int, dtype: np.dtype[Any]
) -> Record:
    """Make piece `number` in `job.folder` of the documents to keep in a raw piece."""
    chosen, old = portion.item, portion.item.record
    record = Record(number=number, first_unit=old.first_unit, limit=None, only=False, source=portion.source)
    record.bad, record.flagged, record.listed = old.bad, old.flagged, old.listed
    causes = Counter(CAUSES[verdict] for verdict in chosen.verdicts.tolist() if verdict != KEPT)
    record.dropped = dict(sorted((Counter(old.dropped) + causes).items()))
    with PieceWriter(job.folder, record, dtype) as piece:
        rows = chosen.rows
        keys = (rows[:, 0] % np.uint64(KEYS)).astype(np.int64)
        val = keys < job.val_fraction * KEYS
        lengths, text_bytes = rows[:, -2].astype(np.int64), rows[:, -1].astype(np.int64)
        Places(record).add(val[keep], lengths[keep], keys[keep], text_bytes[keep])
        for split in SPLITS:
            mine = val if split == "val" else ~val
            for start, end in _spans(lengths[mine], keep[mine]):
                _copy(piece_path(raw, old.number, split), start, end, piece, split)
    return record


def _copy(path: Path, start: int, end: int, piece: PieceWriter, split: Split) -> None:
    with path.open("rb") as file:
        file.seek(start * piece.dtype.itemsize)
        for first in range(start, end, COPY_TOKENS):
            piece.add(split, np.fromfile(file, piece.dtype, min(COPY_TOKENS, end - first)))


def _spans(lengths: np.ndarray, keep: np.ndarray) -> Iterator[tuple[int, int]]:
    """The stretches of tokens of consecutive documents to keep."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    changes = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for first, last in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
        yield int(ends[first]), int(ends[last])


def _up_to(limit: int, chosen: Chosen) -> np.ndarray:
    """Which documents to keep: those that stay, up to the one that reaches `limit` tokens."""
    lengths = np.where(chosen.verdicts == KEPT, chosen.rows[:, -2], 0)
    return (chosen.verdicts == KEPT) & (np.cumsum(lengths) - lengths < limit)
