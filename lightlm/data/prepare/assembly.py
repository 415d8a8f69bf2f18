"""Encoded blocks, in order, appended to the shards; an interrupted assembly resumes.

At intervals, what is appended is forced to the disk, a state file says how far the shards go, and the encoded blocks
in them are deleted. So a corpus takes the disk space of its shards and a little more, and a kill loses only the blocks
being encoded.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from lightlm.data.prepare.encoded_block import (
    MASKS,
    EncodedBlock,
    LeftOut,
    block_path,
    read_tokens,
    remove_encoded_block,
)
from lightlm.data.prepare.writer import MaskWriter, SplitWriter, WriterState
from lightlm.data.shards import (
    MASK_BEGINS,
    MASK_DTYPE,
    MASK_TRAINED,
    MASK_VALUES,
    SPLITS,
    ShardEntry,
    Split,
    UnigramEntropy,
    token_dtype,
)
from lightlm.data.tokenizer import Tokenizer
from lightlm.files import write_bytes

SPLIT_RULE = (
    "a document is for validation if xxh3_64(its UTF-8 text) mod 2**32 < val_fraction * 2**32; if none is, validation "
    "gets the last val_fraction of the tokens (at least 1,024 or a tenth), from the first document that begins there"
)
MIN_VAL_TOKENS = 1_024  # one sequence of a small model

SAVE_TOKENS = 50_000_000  # between two states: a fifth of a second of copying, 100 MB of encoded blocks
LISTED = 1_000  # messages about skipped records that the manifest keeps


class AssemblyState(LeftOut):
    """How far the assembly is: the shards hold the first `blocks` blocks, up to what the writers' states say."""

    blocks: int = 0
    documents: int = 0
    tokens: int = 0
    writers: dict[Split, WriterState]
    masks: dict[Split, WriterState] = Field(default_factory=dict)  # of conversations


class Assembly:
    """Appends the encoded blocks in `blocks` to the shards in `folder`, and keeps its state in the file `state`."""

    def __init__(
        self, folder: Path, state: Path, blocks: Path, tokenizer: Tokenizer, val_fraction: float, shard_tokens: int,
        *, conversations: bool = False,
    ) -> None:  # fmt: skip
        """Resume from the file `state`, if it exists. Raises OSError."""
        self._path, self._blocks = state, blocks
        self._tokenizer, self._val_fraction = tokenizer, val_fraction
        if state.is_file():
            with np.load(state) as saved:
                self.state, counts = AssemblyState.model_validate_json(saved["state"].tobytes()), saved["counts"]
                mask_counts = saved["mask_counts"] if conversations else None
        else:
            self.state = AssemblyState(writers={split: WriterState() for split in SPLITS})
            counts = np.zeros((len(SPLITS), tokenizer.vocab_size), np.int64)
            mask_counts = np.zeros((len(SPLITS), MASK_VALUES), np.int64) if conversations else None
            if conversations:
                self.state.masks = {split: WriterState() for split in SPLITS}
        self._writers = {
            split: SplitWriter(folder, split, tokenizer, shard_tokens, self.state.writers[split], counts[number])
            for number, split in enumerate(SPLITS)
        }
        self._masks: dict[Split, SplitWriter] = {}  # of conversations
        if mask_counts is not None:
            self._masks = {
                split: MaskWriter(folder, split, tokenizer, shard_tokens, self.state.masks[split], mask_counts[number])
                for number, split in enumerate(SPLITS)
            }
        self._unsaved: list[int] = []  # blocks that are appended and not deleted yet
        self._unsaved_tokens = 0

    def add(self, encoded: EncodedBlock) -> None:
        """Append the next block."""
        state = self.state
        for split, tokens in encoded.tokens.items():
            if tokens:
                path = block_path(self._blocks, encoded.number, split)
                for part in read_tokens(path, token_dtype(self._tokenizer.vocab_size), 0, tokens):
                    self._writers[split].add(part)
                if self._masks:
                    for part in read_tokens(
                        block_path(self._blocks, encoded.number, MASKS[split]), MASK_DTYPE, 0, tokens
                    ):
                        self._masks[split].add(part)
            self._writers[split].state.text_bytes += encoded.text_bytes[split]
        state.add(encoded, LISTED)
        state.blocks, state.documents = encoded.number + 1, state.documents + encoded.documents
        state.tokens += encoded.total_tokens
        self._unsaved.append(encoded.number)
        self._unsaved_tokens += encoded.total_tokens
        if self._unsaved_tokens >= SAVE_TOKENS:
            self.save()

    @property
    def text_bytes(self) -> dict[Split, int]:
        """Bytes of text by split."""
        return {split: self._writers[split].state.text_bytes for split in SPLITS}

    @property
    def shards(self) -> list[ShardEntry]:
        """The finished shards, train first."""
        return [entry for split in SPLITS for entry in self._writers[split].state.entries]

    @property
    def masks(self) -> list[ShardEntry]:
        """The masks beside them."""
        return [entry for split in SPLITS for entry in self.state.masks[split].entries]

    @property
    def trained_tokens(self) -> dict[Split, int]:
        """Tokens that are trained on, by split."""
        return {
            split: int(sum(count for value, count in enumerate(writer.token_counts.tolist()) if value & MASK_TRAINED))
            for split, writer in self._masks.items()
        }

    def finish(self) -> None:
        """Fill an empty validation split from the train split, and close the shards."""
        train, val = (self._writers[split] for split in SPLITS)
        if self._val_fraction and train.state.total_tokens > 1 and not val.state.total_tokens:
            self._move_tail(train, val)
        if not self._masks and train.state.total_tokens and next(train.tail(1))[0] != self._tokenizer.end_of_text_id:
            train.add(np.array([self._tokenizer.end_of_text_id]))  # the move cut a document in two
        for writer in self._all_writers:
            writer.close()

    @property
    def _all_writers(self) -> list[SplitWriter]:
        return [*self._writers.values(), *self._masks.values()]

    def _move_tail(self, train: SplitWriter, val: SplitWriter) -> None:
        """Move the last tokens of the train split to validation.

        The state is saved before the train shards are cut: a kill at any time leaves the tokens in one of the splits.
        """
        total = train.state.total_tokens
        least = min(MIN_VAL_TOKENS, math.ceil(total / 10))
        count = min(max(math.ceil(self._val_fraction * total), least), total - 1)
        if self._masks:
            count = self._whole_conversations(count)
        else:
            # Validation begins with a document, if one begins in the first half of the tail.
            half = np.concatenate([*train.tail(count + 1)])[: count // 2 + 1]
            ends = np.flatnonzero(half == self._tokenizer.end_of_text_id)
            count -= int(ends[0]) if ends.size else 0
        if not count:
            return
        for tokens in train.tail(count):
            val.add(tokens)
        token_bytes = self._tokenizer.token_bytes().astype(np.int64)  # exact for byte-level tokenizers
        moved = min(int(val.token_counts @ token_bytes), train.state.text_bytes)
        train.state.text_bytes, val.state.text_bytes = train.state.text_bytes - moved, moved
        train.forget_tail(count)
        cut = [train]
        if self._masks:
            for masks in self._masks["train"].tail(count):
                self._masks["val"].add(masks)
            self._masks["train"].forget_tail(count)
            cut.append(self._masks["train"])
        self.save()
        for writer in cut:
            writer.cut_files()

    def _whole_conversations(self, count: int) -> int:
        """Return the tokens of the conversations that begin in the last `count`, else of the last one.

        0 if there is only one.
        """
        train = self._masks["train"]
        total = train.state.total_tokens
        starts = np.flatnonzero(np.concatenate([*train.tail(total)]) & MASK_BEGINS)
        later = starts[starts >= total - count]
        start = int(later[0] if later.size else starts[-1])
        return total - start if start else 0

    def save(self) -> None:
        """Force what is appended to the disk, save the state, and delete the blocks that are no longer needed."""
        for writer in self._all_writers:
            writer.flush()
        content = io.BytesIO()
        description = np.frombuffer(self.state.model_dump_json().encode(), np.uint8)
        counts: dict[str, Any] = {"counts": np.stack([self._writers[split].token_counts for split in SPLITS])}
        if self._masks:
            counts["mask_counts"] = np.stack([self._masks[split].token_counts for split in SPLITS])
        np.savez(content, state=description, **counts)
        write_bytes(self._path, content.getvalue())
        for block in self._unsaved:
            remove_encoded_block(self._blocks, block)
        self._unsaved, self._unsaved_tokens = [], 0

    def close(self) -> None:
        """Close the open files; what is not saved is done again when the preparation resumes."""
        for writer in self._all_writers:
            writer.abandon()

    def unigram(self) -> UnigramEntropy | None:
        """Return the cross-entropy of the validation tokens under the train split's token frequencies.

        Frequencies are smoothed by adding one. None without both splits. End-of-text tokens are not text: they
        count per token, and not per byte, as in training's `val_loss` and `val_bpb`.
        """
        train, val = (self._writers[split] for split in SPLITS)
        tokens, text_bytes = int(val.token_counts.sum()), val.state.text_bytes
        if (
            not train.token_counts.any() or not tokens or not text_bytes or self._masks
        ):  # of conversations, only some tokens are trained on
            return None
        total = int(train.token_counts.sum()) + len(train.token_counts)
        nats_V = val.token_counts * (math.log(total) - np.log(train.token_counts + 1.0))
        text_nats = float(nats_V.sum(where=self._tokenizer.token_bytes() > 0))
        return UnigramEntropy(
            nats_per_token=float(nats_V.sum()) / tokens, bits_per_byte=text_nats / math.log(2) / text_bytes
        )
