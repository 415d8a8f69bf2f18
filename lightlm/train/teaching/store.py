"""`prepare-data --teacher`: compute a teacher's likeliest next tokens, and store them beside the train shards.

The teacher sees each document from its beginning, whatever sequences a run cuts: the end-of-text token before it, then
its tokens. In a document longer than the context, it moves on by three quarters of it, so each token has at least a
quarter of a context before it. The result is a function of data, teacher and settings; interruptions do not change it.
"""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightlm import __version__
from lightlm.convert.load import load_pretrained
from lightlm.data.folder import DataFolder
from lightlm.data.shards import ShardEntry, TokenStream
from lightlm.data.top_tokens import (
    MANIFEST,
    SUFFIX,
    TEACHER_FOLDER,
    StoredTeacher,
    open_top_tokens,
    read_stored_teacher,
    record_dtype,
    train_checksums,
    unfinished,
)
from lightlm.device import pick_device, pick_dtype
from lightlm.errors import DataError, DiskFullError, UsageError
from lightlm.files import checksum, remove_folder, sync_file, sync_tree, write_text, writing
from lightlm.train.step.loss import softmax_rows
from lightlm.train.step.teacher import Teacher
from lightlm.train.teaching.load import check_tokenizer, identity_of

TOP_K, CONTEXT = 64, 1024
_BLOCK_TOKENS = 16_384  # that the teacher reads between two saves of the progress
_PASS_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 32_768}  # of a forward pass, padding included
_GPU_ROWS = 1024  # tokens whose logits a GPU sorts at once

Report = Callable[[int, int], None]
"""Receives the tokens that are stored, of how many."""


@dataclass(frozen=True)
class Piece:
    """Tokens that the teacher sees together: it begins at `start`, and its records are those of `first` to `end`."""

    start: int
    first: int
    end: int


def pieces_of(starts: np.ndarray, length: int, context: int) -> Iterator[Piece]:
    """Yield the pieces of documents that begin at `starts`, in a stream of `length` tokens, in order."""
    step = context - context // 4
    for start, end in itertools.pairwise([*starts.tolist(), length]):
        yield Piece(start, start, min(start + context, end))
        for first in range(start + context, end, step):
            stop = min(first + step, end)
            yield Piece(max(stop - context, start), first, stop)


def store_teacher(
    folder: Path,
    reference: str,
    *,
    top_k: int = TOP_K,
    context: int | None = None,
    dtype: str = "auto",
    note: Callable[[str], None] = lambda _: None,
    report: Report = lambda done, total: None,
) -> StoredTeacher:
    """Store what a teacher says of the train split of a prepared folder, or resume it; return its manifest.

    Args:
        reference: as of `load_pretrained`.
        context: tokens that the teacher sees at most; None is its own context, at most `CONTEXT`.
        note: receives what the user should read.

    Raises:
        UsageError: an argument is out of its range.
        DataError: the tokenizers differ, or the folder holds what another teacher says.
        DiskFullError: the disk does not hold the result.
    """
    data = DataFolder.open(folder)
    manifest, stream = data.manifest, data.split("train")
    if not manifest.shards or not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} is not a folder of `lightlm prepare-data`, so no teacher can be stored in it")
    if not 1 <= top_k <= manifest.vocab_size:
        raise UsageError(f"--top-k {top_k}: it must be between 1 and the vocabulary's {manifest.vocab_size:,}")
    loaded = load_pretrained(reference)
    check_tokenizer(loaded, reference, data)
    longest = loaded.model.config.max_seq_len
    context = min(longest, CONTEXT) if context is None else context
    if not 2 <= context <= longest:
        raise UsageError(f"--teacher-context {context}: {reference} sees at most {longest:,} tokens, and at least 2")
    device = pick_device("auto")
    precision = pick_dtype(dtype, device, loaded.model.config.hidden_size)
    name = str(precision).removeprefix("torch.")
    settings: dict[str, Any] = {
        "identity": identity_of(loaded.model), "top_k": top_k, "context": context, "of": train_checksums(manifest)
    }  # fmt: skip
    if (there := read_stored_teacher(folder)) is not None:
        open_top_tokens(folder, manifest)
        if {key: getattr(there, key) for key in settings} == settings:
            return there
        raise DataError(
            f"{folder / TEACHER_FOLDER} holds the top {there.top_k} tokens of {there.teacher} in a context of "
            f"{there.context}; delete the folder to store others"
        )
    with _Workspace(folder, settings | {"dtype": name}, note) as workspace:
        size = record_dtype(top_k, manifest.vocab_size).itemsize
        _check_room(folder, size, len(stream) - workspace.tokens, note)
        teacher = Teacher(loaded.model.to(device), data.tokenizer.vocab_size, precision)
        shards = [entry for entry in manifest.shards if entry.split == "train"]
        entries, rest = workspace.fill(teacher, stream, shards, context, top_k, manifest.vocab_size, report)
        stored = StoredTeacher(
            teacher=reference, **settings, dtype=name, rest=rest, shards=entries, lightlm_version=__version__
        )
        workspace.finish(stored)
    return stored


def _check_room(folder: Path, size: int, tokens: int, note: Callable[[str], None]) -> None:
    needed, free = size * tokens, shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"the teacher's probabilities take {size} bytes per token: {needed / 1e9:,.1f} GB for {tokens:,} tokens, "
            f"and {folder.resolve().parent} has {free / 1e9:,.1f} GB. Free some space, or lower --top-k"
        )
    note(
        f"The teacher's probabilities take {size} bytes per token: {needed / 1e6:,.1f} MB for {tokens:,} tokens "
        f"({free / 1e9:,.1f} GB are free)."
    )


class _Workspace(contextlib.AbstractContextManager["_Workspace"]):
    """The folder of unfinished work beside the data folder, held by one process.

    folder/       becomes teacher/ by a rename
    state.json    the settings, the finished pieces and tokens, the mass that is not stored
    """

    def __init__(self, data: Path, settings: dict[str, Any], note: Callable[[str], None]) -> None:
        self._target, self._path = data / TEACHER_FOLDER, unfinished(data)
        self._folder, self._state_file = self._path / "folder", self._path / "state.json"
        self._settings, self._note = settings, note
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "_Workspace":
        from filelock import FileLock, Timeout

        self._path.mkdir(exist_ok=True)
        try:
            self._held.enter_context(FileLock(self._path / "lock", timeout=0))
        except Timeout as error:
            raise DataError(f"Another `lightlm prepare-data` is writing {self._target}; wait for it") from error
        try:
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = {}
        if state.get("settings") != self._settings:
            if state.get("tokens"):
                self._note("Unfinished work with another teacher or other settings is dropped.")
            remove_folder(self._folder)
            state = {"settings": self._settings, "pieces": 0, "tokens": 0, "rest": 0.0}
        self._folder.mkdir(exist_ok=True)
        self._state = state
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()
        if not self._folder.exists():
            remove_folder(self._path)

    @property
    def tokens(self) -> int:
        """Tokens that are stored."""
        return int(self._state["tokens"])

    def fill(
        self,
        teacher: Teacher,
        stream: TokenStream,
        shards: list[ShardEntry],
        context: int,
        top_k: int,
        vocab_size: int,
        report: Report,
    ) -> tuple[list[ShardEntry], float]:
        """Store all records; return the entries of their files, and the mean mass that is not stored."""
        files = [self._folder / Path(shard.file).with_suffix(SUFFIX).name for shard in shards]
        dtype = record_dtype(top_k, vocab_size)
        pieces = pieces_of(stream.document_starts(), len(stream), context)
        remaining = itertools.islice(pieces, self._state["pieces"], None)
        report(self.tokens, len(stream))
        for block in _blocks(remaining):
            records, rest = records_of(teacher, stream, block, dtype)
            with writing(self._folder):
                self._write(records, files, [shard.tokens for shard in shards])
            state = self._state
            state |= {"pieces": state["pieces"] + len(block), "tokens": state["tokens"] + len(records)}
            state["rest"] += rest
            write_text(self._state_file, json.dumps(state))
            report(self.tokens, len(stream))
        entries = [
            ShardEntry(file=file.name, split="train", tokens=shard.tokens, documents=0, xxh3=checksum(file))
            for file, shard in zip(files, shards, strict=True)
        ]
        return entries, self._state["rest"] / max(len(stream), 1)

    def _write(self, records: np.ndarray, files: list[Path], sizes: list[int]) -> None:
        """Write records behind those of the state, over what a kill left there, and flush them to the disk."""
        begin = 0
        for file, size in zip(files, sizes, strict=True):
            offset = self.tokens - begin
            part = records[max(-offset, 0) : max(size - offset, 0)]
            begin += size
            if not len(part):
                continue
            file.touch()
            with file.open("r+b") as out:
                out.truncate(max(offset, 0) * records.dtype.itemsize)
                out.seek(0, 2)
                out.write(part.tobytes())
            sync_file(file)

    def finish(self, stored: StoredTeacher) -> None:
        """Move the complete folder into the data folder."""
        write_text(self._folder / MANIFEST, stored.model_dump_json(indent=2) + "\n")
        sync_tree(self._folder)
        self._folder.rename(self._target)


def records_of(
    teacher: Teacher, stream: TokenStream, pieces: list[Piece], dtype: np.dtype[Any]
) -> tuple[np.ndarray, float]:
    """Return the records of consecutive pieces, and the sum of the masses that they leave out."""
    begin, rest = pieces[0].first, 0.0
    records = np.zeros(pieces[-1].end - begin, dtype)
    for batch in _batches(pieces, _PASS_TOKENS[teacher.model.device.type]):
        length = max(piece.end - piece.start for piece in batch)
        tokens_BT = torch.zeros(len(batch), length, dtype=torch.long)  # padding on the right, which no token sees
        for row, piece in zip(tokens_BT, batch, strict=True):
            row[: piece.end - piece.start] = torch.from_numpy(stream.slice(piece.start, piece.end - piece.start))
        states = teacher(tokens_BT.to(teacher.model.device))
        wanted = torch.cat([
            torch.arange(piece.first - piece.start, piece.end - piece.start) + number * length
            for number, piece in enumerate(batch)
        ])  # fmt: skip
        states = states.select(wanted.to(states.x_NE.device))
        at = 0
        rows = _GPU_ROWS if states.x_NE.device.type != "cpu" else 8 * softmax_rows(teacher.vocab_size)
        places = np.concatenate([np.arange(piece.first, piece.end) for piece in batch]) - begin
        while at < len(places):
            chunk = slice(at, at + rows)
            ids, log_p, log_rest = top_of(states.chunk(chunk).logits_RU, dtype["ids"].shape[0])
            found = np.zeros(len(ids), dtype)
            found["ids"], found["log_p"], found["log_rest"] = ids.numpy(), log_p.numpy(), log_rest.numpy()
            records[places[chunk]] = found
            rest += float(log_rest.exp().sum())
            at += rows
    return records, rest


def top_of(logits_RU: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids (R, K), log-probabilities (R, K) and the log of the mass of all others (R,), on the CPU."""
    log_p_RU = logits_RU.float().log_softmax(-1)
    log_p_RK, ids_RK = log_p_RU.topk(top_k)
    log_rest_R = log_p_RU.scatter_(1, ids_RK, -torch.inf).logsumexp(-1)
    return ids_RK.cpu(), log_p_RK.cpu(), log_rest_R.cpu()


def _blocks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield consecutive pieces of at least `_BLOCK_TOKENS` tokens together."""
    block: list[Piece] = []
    tokens = 0
    for piece in pieces:
        block.append(piece)
        tokens += piece.end - piece.start
        if tokens >= _BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _batches(pieces: list[Piece], tokens: int) -> Iterator[list[Piece]]:
    """Yield pieces of similar lengths together, padded to at most so many tokens; one piece may be longer."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.end):
        longest = batch[0].end - batch[0].start if batch else 0
        if batch and (len(batch) + 1) * longest > tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
