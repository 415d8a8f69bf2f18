"""Choosing documents after they are encoded: duplicates, where one document's fate depends on others.

    engine -> encoded blocks with a list of their documents -> Selector -> encoded blocks of what stays -> Assembly

The selector takes the blocks in order, decides which documents stay, and copies those. It logs every block that it
writes, so that a later process can resume.

A row of a block's `documents` file is one document, in order, uint64: its signature (`deduplication.Signer`), its
tokens with the end-of-text token, its bytes of text.
"""

import json
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightlm.data.prepare.blocks import HASHES, Block, Job
from lightlm.data.prepare.encode import Report
from lightlm.data.prepare.encoded_block import (
    DOCUMENTS,
    MASKS,
    EncodedBlock,
    EncodedBlockWriter,
    LeftOut,
    block_path,
    read_tokens,
    remove_encoded_block,
)
from lightlm.data.prepare.executors import Engine
from lightlm.data.select.deduplication import EXACT_DUPLICATE, KEPT, NEAR_DUPLICATE, Deduplicator, Mode, Signer
from lightlm.data.shards import MASK_DTYPE, SPLITS
from lightlm.files import write_bytes

CAUSES = {EXACT_DUPLICATE: "duplicate", NEAR_DUPLICATE: "near-duplicate"}


class Selector:
    """Turns encoded blocks into encoded blocks of the documents that stay.

    Args:
        work: the folder for the blocks before selection and the log.
        max_tokens: stop after the document that reaches this many tokens.
        done: how many blocks the shards already hold.
    """

    def __init__(self, work: Path, dedup: Mode, max_tokens: int | None, done: int) -> None:
        self._before, self._log = work / "before-selection", work / "selection-log"
        for folder in (self._before, self._log):
            folder.mkdir(exist_ok=True)
        self._signer, self._deduplicator, self._max_tokens = Signer(dedup), Deduplicator(dedup), max_tokens
        self._tokens = 0  # that stayed so far
        for number in range(done):
            header, _, content = (self._log / f"{number:08d}").read_bytes().partition(b"\n")
            self._tokens += json.loads(header)["tokens"]
            self._deduplicator.remember(np.frombuffer(content, "<u8").reshape(-1, self._signer.columns))

    def select(
        self, blocks: Iterator[Block], engine: Engine, job: Job, report: Report, dtype: np.dtype[Any]
    ) -> Generator[EncodedBlock, None, None]:
        """Yield the encoded blocks of what stays of blocks not yet done; their files are in `job.folder`."""
        limit = self._max_tokens
        if limit is not None and self._tokens >= limit:
            return
        before = replace(job, folder=self._before, signer=self._signer)
        for old in engine(before, blocks, report):
            path = block_path(self._before, old.number, DOCUMENTS)
            rows = np.fromfile(path, "<u8") if path.is_file() else np.zeros(0, np.uint64)
            documents = rows.reshape(-1, self._signer.columns + 2)
            verdicts = self._deduplicator.decide(documents[:, :-2])
            keep = verdicts == KEPT
            tokens = int(documents[keep, -2].sum())
            if limit is not None:  # up to the document that reaches it
                lengths = np.where(keep, documents[:, -2], 0).astype(np.int64)
                keep &= np.cumsum(lengths) - lengths < limit - self._tokens
            encoded = self._copy(old, documents, verdicts, keep, job, dtype)
            header = json.dumps({"tokens": tokens}).encode()
            write_bytes(self._log / f"{old.number:08d}", header + b"\n" + documents[keep, :-2].astype("<u8").tobytes())
            remove_encoded_block(self._before, old.number)
            yield encoded
            self._tokens += tokens
            if limit is not None and self._tokens >= limit:
                return

    def _copy(
        self,
        old: EncodedBlock,
        documents: np.ndarray,
        verdicts: np.ndarray,
        keep: np.ndarray,
        job: Job,
        dtype: np.dtype[Any],
    ) -> EncodedBlock:
        """Write a block in `job.folder`: the documents to keep of one before selection."""
        left_out = old.model_dump(include=set(LeftOut.model_fields))
        encoded = EncodedBlock(number=old.number, first_unit=old.first_unit, limit=None, **left_out)
        for verdict, cause in CAUSES.items():
            encoded.drop(cause, int((verdicts == verdict).sum()))
        with EncodedBlockWriter(job.folder, encoded, dtype) as writer:
            val = (documents[:, 0] % np.uint64(HASHES)).astype(np.int64) < job.val_fraction * HASHES
            lengths, text_bytes = documents[:, -2].astype(np.int64), documents[:, -1].astype(np.int64)
            writer.count(val[keep], text_bytes[keep])
            for split in SPLITS:
                mine = val if split == "val" else ~val
                path, masks = (block_path(self._before, old.number, kind) for kind in (split, MASKS[split]))
                for start, end in _spans(lengths[mine], keep[mine]):
                    for tokens, marks in _parts(path, masks, dtype, start, end):
                        writer.add(split, tokens, marks)
        return encoded


def _parts(
    path: Path, masks: Path, dtype: np.dtype[Any], start: int, end: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield the tokens of a range in parts, with their masks where the block holds conversations."""
    parts = read_tokens(path, dtype, start, end)
    if masks.is_file():
        yield from zip(parts, read_tokens(masks, MASK_DTYPE, start, end), strict=True)
    else:
        yield from ((tokens, None) for tokens in parts)


def _spans(lengths: np.ndarray, keep: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the token ranges of consecutive documents to keep."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    changes = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for first, last in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
        yield int(ends[first]), int(ends[last])
