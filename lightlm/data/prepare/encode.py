"""One block of a source, encoded: the pure function that every engine runs, on whatever machine.

The piece that it writes depends on the block and the job alone, so that assembling pieces in their order gives the
same folder whatever ran where, was killed, or ran twice.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow
import xxhash
from pyarrow import compute

from lightlm.data.prepare.blocks import BLANK, AbandonedError, Block, BlockReader, Job
from lightlm.data.prepare.cutting import encode_large, place_of_cut
from lightlm.data.prepare.encoded_block import PieceWriter, Record
from lightlm.data.prepare.encoders import EncoderError, check_sample, refuse_end_of_text, worker_encoder
from lightlm.data.prepare.places import Places
from lightlm.data.prepare.splitting import KEYS, keys_of
from lightlm.data.readers import texts as sizes
from lightlm.data.readers.texts import Texts, byte_lengths, in_chunks
from lightlm.data.shards import Split, token_dtype
from lightlm.errors import DataError

Report = Callable[[int, int, int], None]
"""Called after each chunk with its documents, bytes of text and tokens."""


def encode_block(job: Job, block: Block, report: Report | None = None) -> Record:
    """Encode a block into a piece in `job.folder` and return its record.

    Raises DataError for a mistake in the source (without `job.skip_bad`), or where the encoders differ; OSError where
    the piece cannot be written.
    """
    record = Record(number=block.number, first_unit=block.units[0].id, limit=block.limit, only=block.only)
    tokenizer, _ = worker_encoder(job.tokenizer, job.end_of_text_id, job.encoder)
    with PieceWriter(job.folder, record, token_dtype(tokenizer.vocab_size)) as piece:
        encoding = _Encoding(job, block, piece, report)
        if block.only:
            encoding.run_cut()
        else:
            encoding.run()
    return record


class _Encoding:
    """The documents of a block on their way into its piece."""

    def __init__(self, job: Job, block: Block, piece: PieceWriter, report: Report | None) -> None:
        self._job, self._block, self._piece, self._record = job, block, piece, piece.record
        self._report = report or (lambda *_: None)
        self._reader = BlockReader(job, block)
        self._tokenizer, self._encoder = worker_encoder(job.tokenizer, job.end_of_text_id, job.encoder)
        self._places = Places(piece.record)
        self._full = False  # the limit is reached

    def run(self) -> None:
        """Encode every document."""
        pending: list[pyarrow.Array] = []
        waiting = 0
        for step in self._reader.steps():
            if isinstance(step, Texts):
                pending.append(step.array)
                waiting += int(byte_lengths(step.array).sum())
                if waiting < sizes.CHUNK_BYTES and sum(map(len, pending)) < sizes.CHUNK_DOCUMENTS:
                    continue
            self._flush(pending)
            pending, waiting = [], 0
            if not isinstance(step, Texts) and not self._full:
                self._large(step)
            if self._full:
                break
        self._flush(pending)
        self._close()

    def run_cut(self) -> None:
        """Encode the only document in two: all but its end for training, its end for validation."""
        chosen, place = self._place_of_cut()  # first: a large text should not be held while it is read again
        for number, parts in enumerate(self._reader.visible_documents()):
            if number != chosen:
                _length(self._reader, parts)  # notes what is wrong with it
                continue
            text = _Cuttable(parts)
            self._large(text.up_to(place), "train")
            self._large(text.rest(), "val")
            if self._block.limit is not None:
                break
        self._close()

    def _place_of_cut(self) -> tuple[int, int | None]:
        """Which document it is, and where to cut it. Found by reading it twice more: it may be large.

        Others turn out to be bad in their middle.
        """
        number, characters = self._measured()  # lets go of that reading: of a JSON line it holds a memory map
        return number, place_of_cut(self._document(number), self._job.val_fraction, characters)

    def _measured(self) -> tuple[int, int]:
        reader = BlockReader(self._job, self._block)
        for number, parts in enumerate(reader.visible_documents()):
            characters = _length(reader, parts)
            if characters is not None:
                return number, characters
        raise AssertionError("a block with the only document has one")

    def _document(self, chosen: int) -> Iterator[str]:
        reader = BlockReader(self._job, self._block)
        for number, parts in enumerate(reader.visible_documents()):
            if number == chosen:
                yield from parts
                return
            _length(reader, parts)

    def _close(self) -> None:
        self._record.dropped = dict(sorted((cause, n) for cause, n in self._reader.dropped.items() if n))
        self._record.bad, self._record.listed = self._reader.bad, self._reader.listed
        self._record.flagged = dict(sorted(self._reader.flagged.items()))

    def _flush(self, pending: list[pyarrow.Array]) -> None:
        if self._full or not pending:
            return
        for chunk, _ in in_chunks(pyarrow.concat_arrays(pending)):
            self._whole(chunk)
            if self._full:
                return

    def _whole(self, texts: pyarrow.Array) -> None:
        """Encode a chunk of whole texts."""
        blank = np.asarray(compute.utf8_is_space(texts)) | (byte_lengths(texts) == 0)
        visible = texts.filter(pyarrow.array(~blank)) if blank.any() else texts
        ids, lengths = self._encoder.encode(visible)
        keys = keys_of(visible)
        refuse_end_of_text(self._tokenizer, ids, self._block.units[0].id)
        check_sample(self._encoder, self._tokenizer, visible, ids, lengths, keys, self._block.units[0].id)
        count = self._fitting(lengths + 1)
        if self._full:
            blank = blank[: np.flatnonzero(~blank)[count - 1]]
        self._reader.dropped[BLANK] += int(blank.sum())
        lengths, keys, text_bytes = lengths[:count], keys[:count], byte_lengths(visible)[:count]
        tokens = _with_ends(ids[: lengths.sum()], lengths, self._job.end_of_text_id)
        if self._job.signer is not None:
            self._piece.add_rows(self._job.signer.sign(visible[:count].to_pylist()), lengths + 1, text_bytes)
        val = keys < self._job.val_fraction * KEYS
        self._places.add(val, lengths + 1, keys, text_bytes)
        if val.any():
            chosen = np.repeat(val, lengths + 1)
            self._piece.add("train", tokens[~chosen])
            self._piece.add("val", tokens[chosen])
        else:
            self._piece.add("train", tokens)
        self._report(count, int(text_bytes.sum()), tokens.size)

    def _large(self, parts: Iterator[str], split: Split | None = None) -> None:
        """Encode one large text, part by part; its split is known when all of it has been hashed, unless given."""
        digest, visible, text_bytes = xxhash.xxh3_64(), False, 0
        try:
            for text, ids in encode_large(parts, self._tokenizer, self._encoder, self._block.units[0].id):
                raw = text.encode()
                digest.update(raw)
                visible, text_bytes = visible or not text.isspace(), text_bytes + len(raw)
                self._piece.spool(ids)
                self._report(0, len(raw), len(ids))
        except EncoderError:
            raise
        except (DataError, AbandonedError) as error:
            self._piece.unspool(None)
            if isinstance(error, DataError):
                self._reader.reject(error)
            with contextlib.suppress(AbandonedError):
                for _ in parts:
                    pass
            return
        if not visible:
            self._reader.dropped[BLANK] += split is None
            self._piece.unspool(None)
            return
        self._piece.spool(np.array([self._job.end_of_text_id]))
        lengths, keys = np.array([self._piece.spooled()]), np.array([digest.intdigest() % KEYS])
        self._fitting(lengths)
        if self._job.signer is not None:
            self._piece.add_rows(self._job.signer.of_hash(digest.intdigest()), lengths, np.array([text_bytes]))
        val = keys < self._job.val_fraction * KEYS if split is None else np.array([split == "val"])
        self._places.add(val, lengths, keys, np.array([text_bytes]))
        self._piece.unspool("val" if val[0] else "train")
        self._report(1, 0, 1)

    def _fitting(self, lengths: np.ndarray) -> int:
        """How many of the next documents are still wanted; notes when the limit is reached."""
        if self._block.limit is None:
            return len(lengths)
        reached = np.flatnonzero(self._record.total_tokens + np.cumsum(lengths) >= self._block.limit)
        self._full = bool(reached.size)
        return int(reached[0]) + 1 if reached.size else len(lengths)


def _with_ends(ids: np.ndarray, lengths: np.ndarray, end_of_text_id: int) -> np.ndarray:
    """The ids of documents, end to end, with the end-of-text id after each."""
    tokens = np.empty(ids.size + lengths.size, ids.dtype)
    ends = np.cumsum(lengths + 1) - 1
    inside = np.ones(tokens.size, bool)
    inside[ends] = False
    tokens[inside] = ids
    tokens[ends] = end_of_text_id
    return tokens


def _length(reader: BlockReader, parts: Iterator[str]) -> int | None:
    """Use up a document: its characters, or None where it turns out to be bad, which is noted."""
    try:
        return sum(map(len, parts))
    except AbandonedError:
        return None
    except DataError as error:
        reader.reject(error)
        return None


class _Cuttable:
    """A text in parts as two texts in parts, read one after the other."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts, self._left = parts, ""

    def up_to(self, place: int | None) -> Iterator[str]:
        """The first `place` characters; all of them without a place."""
        for part in self._parts:
            if place is not None and len(part) > place:
                self._left = part[place:]
                yield part[:place]
                return
            yield part
            place = None if place is None else place - len(part)

    def rest(self) -> Iterator[str]:
        """What is left."""
        if self._left:
            yield self._left
        yield from self._parts
