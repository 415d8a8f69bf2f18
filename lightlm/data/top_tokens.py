"""A teacher's likeliest next tokens, stored beside the train shards of a data folder: format, opening, checking.

FOLDER/teacher/ holds a manifest, and for each train shard a file of as many records, without a header. The record of a
token is what the teacher says of the next one: the ids of its K likeliest tokens, likeliest first, the logarithms of
their probabilities, and the logarithm of the mass of all others. All numbers are little-endian.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from lightlm.data.shards import JoinedArrays, Manifest, ShardEntry, token_dtype
from lightlm.errors import DataError

TEACHER_FOLDER, MANIFEST, SUFFIX = "teacher", "manifest.json", ".top"
_ANEW = "Delete the folder, and compute it again with: lightlm prepare-data SOURCE --teacher MODEL"


class StoredTeacher(BaseModel):
    """The content of teacher/manifest.json.

    Attributes:
        identity: changes with the teacher's weights.
        context: tokens that it sees at most.
        rest: mean mass of the tokens that are not stored.
        of: checksums of the train shards.
    """

    format: Literal[1] = 1
    teacher: str
    identity: str
    top_k: int
    context: int
    dtype: str
    rest: float
    of: list[str]
    shards: list[ShardEntry]
    lightlm_version: str = ""

    @property
    def key(self) -> str:
        """The text that identifies these records, by which stored teachers differ."""
        return f"{self.identity} top {self.top_k} of {self.context}"


class TopRecords(NamedTuple):
    """Records of tokens: their likeliest next tokens."""

    ids: np.ndarray  # int64 (..., K)
    log_p: np.ndarray  # float32 (..., K)
    log_rest: np.ndarray  # float32 (...,): -inf where no mass is left


def record_dtype(top_k: int, vocab_size: int) -> np.dtype[Any]:
    """Return the type of a record: 4 K + 2 bytes, or 6 K + 2 with a vocabulary above 65,536 entries."""
    return np.dtype([("ids", token_dtype(vocab_size), (top_k,)), ("log_p", "<f2", (top_k,)), ("log_rest", "<f2")])


def unpacked(records: np.ndarray) -> TopRecords:
    """Return records as numbers to compute with. The probabilities, which float16 has rounded, sum to 1 again."""
    log_p, log_rest = records["log_p"].astype(np.float32), records["log_rest"].astype(np.float32)
    total = np.log(np.exp(log_p).sum(-1) + np.exp(log_rest))
    return TopRecords(records["ids"].astype(np.int64), log_p - total[..., None], log_rest - total)


def read_stored_teacher(folder: Path) -> StoredTeacher | None:
    """Return what a data folder has of a teacher, None for nothing. Raises DataError where that cannot be read."""
    path = folder / TEACHER_FOLDER / MANIFEST
    if not path.parent.exists():
        return None
    try:
        return StoredTeacher.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}). {_ANEW}") from error


def unfinished(data: Path) -> Path:
    """Return the folder of unfinished work on a data folder's teacher."""
    data = data.absolute()
    return data.with_name(f".{data.name}.teacher.partial")


def train_checksums(manifest: Manifest) -> list[str]:
    """Return the checksums of the train shards, which a stored teacher belongs to."""
    return [entry.xxh3 for entry in manifest.shards if entry.split == "train"]


def open_top_tokens(folder: Path, manifest: Manifest) -> tuple[StoredTeacher, JoinedArrays]:
    """Return the stored teacher of a data folder, and its records by position in the train split.

    Raises:
        DataError: there is none, it belongs to other shards, or a file does not have its length.
    """
    stored = read_stored_teacher(folder)
    if stored is None:
        raise DataError(
            f"{folder} holds no probabilities of a teacher. Store them with the command that made the folder and "
            "--teacher MODEL, or name a model in train.distill.teacher"
        )
    if stored.of != train_checksums(manifest):
        raise DataError(f"{folder / TEACHER_FOLDER} belongs to other shards than those of {folder}. {_ANEW}")
    dtype = record_dtype(stored.top_k, manifest.vocab_size)
    arrays = []
    for entry in stored.shards:
        path, expected = folder / TEACHER_FOLDER / entry.file, entry.tokens * dtype.itemsize
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            raise DataError(
                f"{path} {'is missing' if size is None else f'has {size} bytes'}; its {entry.tokens:,} tokens take "
                f"{expected}. Copy it again. {_ANEW}"
            )
        arrays.append(np.memmap(path, dtype=dtype, mode="r", shape=(entry.tokens,)))
    return stored, JoinedArrays(arrays, dtype)
