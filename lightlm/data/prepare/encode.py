"""Encoding one block: the pure function that every engine runs, on any machine.

The encoded block depends only on the block and the job. Encoded blocks assembled in order give the same folder,
whichever worker ran, died or ran twice.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow
import xxhash
from pyarrow import compute

from lightlm.data.chat.answers import Encoded
from lightlm.data.chat.conversation import contents_of, from_text
from lightlm.data.prepare.blocks import BLANK, HASHES, Block, BlockReader, Job, split_hashes
from lightlm.data.prepare.conversations import conversation_encoder
from lightlm.data.prepare.encoded_block import EncodedBlock, EncodedBlockWriter, LeftOut
from lightlm.data.prepare.encoders import Encoder, EncoderError, check_ids, encode_large, worker_encoder
from lightlm.data.readers import texts as sizes
from lightlm.data.readers.texts import Texts, byte_lengths, in_chunks
from lightlm.data.shards import token_dtype
from lightlm.errors import DataError

Report = Callable[[int, int, int], None]
"""Called after each chunk with its documents, bytes of text and tokens."""


def encode_block(job: Job, block: Block, report: Report | None = None) -> EncodedBlock:
    """Encode a block into files in `job.folder`, and return their description.

    Raises DataError for an error in the source (unless `job.skip_bad`) or where the encoders differ, and OSError where
    the files cannot be written.
    """
    encoded = EncodedBlock(number=block.number, first_unit=block.units[0].id, limit=block.limit)
    encoder = worker_encoder(job.tokenizer, job.encoder, job.end_of_text_id)
    kind = _BlockEncoder if job.train_on is None else _ConversationBlockEncoder
    with EncodedBlockWriter(job.folder, encoded, token_dtype(encoder.tokenizer.vocab_size)) as writer:
        kind(job, block, encoder, writer, report or (lambda *_: None)).run()
    return encoded


class _BlockEncoder:
    """Moves the documents of a block from its reader to its writer."""

    def __init__(self, job: Job, block: Block, encoder: Encoder, writer: EncodedBlockWriter, report: Report) -> None:
        self._job, self._block, self._encoder, self._writer, self._report = job, block, encoder, writer, report
        self._encoded, self._end_of_text_id = writer.encoded, encoder.tokenizer.end_of_text_id
        self._reader = BlockReader(job, block, writer.encoded)
        self._full = False  # the limit is reached

    def run(self) -> None:
        """Encode every document, up to the limit. What comes before a mistake may reach it."""
        pending: list[pyarrow.Array] = []
        waiting, mistake = 0, None
        reader = self._reader.texts()
        while True:
            try:
                texts = next(reader, None)
            except DataError as error:
                texts, mistake = None, error
            if texts is None:
                break
            if isinstance(texts, Texts):
                pending.append(texts.array)
                waiting += int(byte_lengths(texts.array).sum())
                if waiting < sizes.CHUNK_BYTES and sum(map(len, pending)) < sizes.CHUNK_DOCUMENTS:
                    continue
            self._flush(pending)
            pending, waiting = [], 0
            if not isinstance(texts, Texts) and not self._full:
                self._large(texts)
            if self._full:
                return
        self._flush(pending)
        if mistake is not None and not self._full:
            raise mistake

    def _flush(self, pending: list[pyarrow.Array]) -> None:
        for chunk, _ in in_chunks(pyarrow.concat_arrays(pending)) if pending else ():
            if not self._full:
                self._chunk(chunk)

    def _chunk(self, texts: pyarrow.Array) -> None:
        """Encode a chunk of complete texts."""
        blank = np.asarray(compute.utf8_is_space(texts)) | (byte_lengths(texts) == 0)
        visible = texts.filter(pyarrow.array(~blank)) if blank.any() else texts
        ids, lengths = self._encoder.encode(visible)
        hashes = split_hashes(visible)
        check_ids(self._encoder, visible, ids, lengths, hashes, self._block.units[0].id)
        count = self._fitting(lengths + 1)
        if self._full:
            blank = blank[: np.flatnonzero(~blank)[count - 1]]
        self._encoded.drop(BLANK, int(blank.sum()))
        lengths, text_bytes = lengths[:count], byte_lengths(visible)[:count]
        self._count_losses(visible[:count], ids[: lengths.sum()])
        tokens = np.insert(ids[: lengths.sum()], np.cumsum(lengths), self._end_of_text_id)
        if self._job.signer is not None:
            self._writer.add_documents(self._job.signer.sign(visible[:count].to_pylist()), lengths + 1, text_bytes)
        val = hashes[:count] < self._job.val_fraction * HASHES
        self._writer.count(val, text_bytes)
        for_val = np.repeat(val, lengths + 1)
        self._writer.add("train", tokens[~for_val] if val.any() else tokens)
        self._writer.add("val", tokens[for_val])
        self._report(count, int(text_bytes.sum()), tokens.size)

    def _large(self, parts: Iterator[str]) -> None:
        """Encode one large text part by part. Its hash, and so its split, is known at its end."""
        digest, visible, text_bytes = xxhash.xxh3_64(), False, 0
        dtype = self._writer.dtype
        with tempfile.TemporaryFile(dir=self._job.folder) as spool:
            try:
                for text, ids in encode_large(parts, self._encoder, self._block.units[0].id):
                    data = text.encode()
                    digest.update(data)
                    self._count_losses(pyarrow.array([text], pyarrow.large_string()), ids)
                    visible, text_bytes = visible or not text.isspace(), text_bytes + len(data)
                    spool.write(ids.astype(dtype).data)
                    self._report(0, len(data), len(ids))
            except EncoderError:
                raise
            except DataError as error:
                self._reader.reject(error)
                with contextlib.suppress(DataError):  # the text is already counted as unreadable
                    for _ in parts:
                        pass
                return
            if not visible:
                self._encoded.drop(BLANK)
                return
            spool.write(np.array([self._end_of_text_id], dtype).data)
            lengths, bytes_of_one = np.array([spool.tell() // dtype.itemsize]), np.array([text_bytes])
            self._fitting(lengths)
            if self._job.signer is not None:
                self._writer.add_documents(self._job.signer.of_hash(digest.intdigest()), lengths, bytes_of_one)
            val = digest.intdigest() % HASHES < self._job.val_fraction * HASHES
            self._writer.count(np.array([val]), bytes_of_one)
            spool.seek(0)
            while data := spool.read(1 << 24):
                self._writer.add("val" if val else "train", np.frombuffer(data, dtype))
        self._report(1, 0, 1)

    def _count_losses(self, texts: pyarrow.Array, ids: np.ndarray) -> None:
        if self._encoder.losses is not None:
            self._encoded.add(LeftOut(lost=self._encoder.losses.count(texts, ids)), 0)

    def _fitting(self, lengths: np.ndarray) -> int:
        """Return how many of the next documents fit the limit; set `_full` when they reach it."""
        if self._block.limit is None:
            return len(lengths)
        reached = np.flatnonzero(self._encoded.total_tokens + np.cumsum(lengths) >= self._block.limit)
        self._full = bool(reached.size)
        return int(reached[0]) + 1 if reached.size else len(lengths)


class _ConversationBlockEncoder(_BlockEncoder):
    """Moves the conversations of a block, which follow each other without a separator."""

    def _chunk(self, texts: pyarrow.Array) -> None:
        job = self._job
        assert job.train_on is not None
        encoder = conversation_encoder(self._encoder.tokenizer, job.tokenizer.parent, job.train_on)
        found: list[Encoded] = []
        kept: list[int] = []
        for number, text in enumerate(texts.to_pylist()):
            messages = from_text(text)
            try:
                found.append(encoder.encode(messages))
                kept.append(number)
            except DataError as error:
                beginning = f"the conversation that begins {messages[0]['content'][:60]!r}"
                self._reader.reject(DataError(f"{self._block.units[0].id}: {beginning}: {error}"))
        if not found:
            return
        hashes = split_hashes(texts.take(pyarrow.array(kept)))
        count = self._fitting(np.array([len(each.ids) for each in found]))
        found = found[:count]
        lengths = np.array([len(each.ids) for each in found])
        rendered = pyarrow.array([each.text for each in found], pyarrow.large_string())
        text_bytes, ids = byte_lengths(rendered), np.concatenate([each.ids for each in found])
        self._count_losses(rendered, ids)
        if job.signer is not None:
            signed = texts.take(pyarrow.array(kept[:count])).to_pylist()
            self._writer.add_documents(job.signer.sign(signed), lengths, text_bytes)
        val = hashes[:count] < job.val_fraction * HASHES
        self._writer.count(val, text_bytes)
        for_val, masks = np.repeat(val, lengths), np.concatenate([each.masks for each in found])
        self._writer.add("train", ids[~for_val], masks[~for_val])
        self._writer.add("val", ids[for_val], masks[for_val])
        self._report(count, int(text_bytes.sum()), ids.size)

    def _large(self, parts: Iterator[str]) -> None:
        beginning = next(parts)
        with contextlib.suppress(DataError):
            for _ in parts:
                pass
        self._reader.reject(
            DataError(
                f"{self._block.units[0].id}: the conversation that begins {contents_of(beginning)[:60]!r} is above "
                f"{sizes.LARGE_BYTES >> 20} MB"
            )
        )
