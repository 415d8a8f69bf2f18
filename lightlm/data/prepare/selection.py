"""Choosing documents after they are encoded: duplicates and mixtures, where one document's fate depends on others.

    engine -> encoded blocks with a list of their documents -> Selector -> encoded blocks of what stays -> Assembly

The selector takes the blocks of each source in order, decides which documents stay, orders the blocks for the mixture,
and copies what stays. It logs every block that it writes, so that a later process can resume.

A row of a block's `documents` file is one document, in order, uint64: its signature (`deduplication.Signer`), its
tokens with the end-of-text token, its bytes of text.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lightlm.data.prepare.blocks import HASHES, Block, Job
from lightlm.data.prepare.encode import Report
from lightlm.data.prepare.encoded_block import (
    DOCUMENTS,
    EncodedBlock,
    EncodedBlockWriter,
    LeftOut,
    block_path,
    read_tokens,
    remove_encoded_block,
)
from lightlm.data.prepare.executors import Engine
from lightlm.data.prepare.mixing.schedule import Mixer, Schedule, SourceBlock
from lightlm.data.select.deduplication import EXACT_DUPLICATE, KEPT, NEAR_DUPLICATE, Deduplicator, Mode, Signer
from lightlm.data.shards import SPLITS
from lightlm.files import write_bytes

CAUSES = {EXACT_DUPLICATE: "duplicate", NEAR_DUPLICATE: "near-duplicate"}


@dataclass(frozen=True)
class JudgedBlock:
    """An encoded block with the rows of its documents and the `Deduplicator`'s verdict for each."""

    encoded: EncodedBlock
    documents: np.ndarray
    verdicts: np.ndarray


class Selector:
    """Turns encoded blocks into encoded blocks of the documents that stay, numbered from `done` on.

    Args:
        work: the folder for the blocks before selection and the log.
        sources: for each source its blocks, from its first.
        shares: the sources' shares in the mixture; 1 for a single source.
        done: how many blocks the shards already hold.
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
        self._before, self._log = work / "before-selection", work / "selection-log"
        for folder in (self._before, self._log):
            folder.mkdir(exist_ok=True)
        self._signer = Signer(dedup or "exact")
        # Each source is searched for duplicates by itself: the order of a mixture depends on what stays.
        self._deduplicators = [Deduplicator(dedup) for _ in sources] if dedup else None
        taken, blocks = [0] * len(sources), [0] * len(sources)
        for number in range(done):
            header, _, content = (self._log / f"{number:08d}").read_bytes().partition(b"\n")
            logged = json.loads(header)
            source = logged["source"]
            taken[source], blocks[source] = taken[source] + logged["tokens"], blocks[source] + 1
            if self._deduplicators is not None:
                signatures = np.frombuffer(content, "<u8").reshape(-1, self._signer.columns)
                self._deduplicators[source].remember(signatures)
        numbered = [_numbered(number, part, blocks[number], len(sources)) for number, part in enumerate(sources)]
        self._schedule = Schedule(numbered, shares, taken)
        self._mixer = Mixer[JudgedBlock](shares, max_tokens, taken)
        self._done = done

    def select(
        self, engine: Engine, job: Job, report: Report, dtype: np.dtype[Any]
    ) -> Generator[EncodedBlock, None, None]:
        """Yield the encoded blocks of what stays; their files are in `job.folder`."""
        before = replace(job, folder=self._before, signer=self._signer)
        judged = self._judged(engine, before, report)
        for number, (block, limit) in enumerate(self._mixer.arrange(judged, self._schedule.finished), self._done):
            keep = block.item.verdicts == KEPT
            if limit is not None:  # up to the document that reaches it
                lengths = np.where(keep, block.item.documents[:, -2], 0)
                keep &= np.cumsum(lengths) - lengths < limit
            encoded = self._copy(block, keep, job, number, dtype)
            header = json.dumps({"source": block.source, "tokens": block.tokens}).encode()
            kept = block.item.documents[keep, :-2] if self._deduplicators is not None else np.zeros(0)
            write_bytes(self._log / f"{number:08d}", header + b"\n" + kept.astype("<u8").tobytes())
            remove_encoded_block(self._before, block.item.encoded.number)
            yield encoded

    def _judged(self, engine: Engine, job: Job, report: Report) -> Iterator[SourceBlock[JudgedBlock]]:
        """Yield blocks as the engine does, those of each source in order."""
        source_of: dict[int, int] = {}

        def blocks() -> Iterator[Block]:
            for source, block in self._schedule:
                source_of[block.number] = source
                yield block

        for encoded in engine(job, blocks(), report):
            source = source_of.pop(encoded.number)
            path = block_path(self._before, encoded.number, DOCUMENTS)
            rows = np.fromfile(path, "<u8") if path.is_file() else np.zeros(0, np.uint64)
            documents = rows.reshape(-1, self._signer.columns + 2)
            verdicts = np.full(len(documents), KEPT, np.uint8)
            if self._deduplicators is not None:
                verdicts = self._deduplicators[source].decide(documents[:, :-2])
            tokens = int(documents[verdicts == KEPT, -2].sum())
            self._schedule.arrived(source, tokens)
            yield SourceBlock(source, tokens, JudgedBlock(encoded, documents, verdicts))

    def _copy(
        self, block: SourceBlock[JudgedBlock], keep: np.ndarray, job: Job, number: int, dtype: np.dtype[Any]
    ) -> EncodedBlock:
        """Write block `number` in `job.folder`: the documents to keep of a block before selection."""
        old, documents, verdicts = block.item.encoded, block.item.documents, block.item.verdicts
        left_out = old.model_dump(include=set(LeftOut.model_fields))
        encoded = EncodedBlock(number=number, first_unit=old.first_unit, limit=None, source=block.source, **left_out)
        for verdict, cause in CAUSES.items():
            encoded.drop(cause, int((verdicts == verdict).sum()))
        with EncodedBlockWriter(job.folder, encoded, dtype) as writer:
            val = (documents[:, 0] % np.uint64(HASHES)).astype(np.int64) < job.val_fraction * HASHES
            lengths, text_bytes = documents[:, -2].astype(np.int64), documents[:, -1].astype(np.int64)
            writer.count(val[keep], text_bytes[keep])
            for split in SPLITS:
                mine = val if split == "val" else ~val
                for start, end in _spans(lengths[mine], keep[mine]):
                    for tokens in read_tokens(block_path(self._before, old.number, split), dtype, start, end):
                        writer.add(split, tokens)
        return encoded


def _numbered(source: int, blocks: Iterator[Block], start: int, sources: int) -> Iterator[Block]:
    """Yield the blocks of a source from `start` on, with numbers that no other source's blocks have."""
    for block in blocks:
        if block.number >= start:
            yield replace(block, number=block.number * sources + source)


def _spans(lengths: np.ndarray, keep: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the token ranges of consecutive documents to keep."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    changes = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for first, last in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
        yield int(ends[first]), int(ends[last])
