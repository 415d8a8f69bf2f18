"""Token shards and the data folder: the format on disk, documented in docs/data-format.md.

A shard is a header of 256 little-endian int32 (magic, version, token count, zeros) followed by the tokens, the
format of llm.c and modded-nanogpt. Importing this module loads numpy, pydantic and xxhash only.
"""

import functools
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from lightlm.errors import DataError
from lightlm.files import checksum, write_bytes

if TYPE_CHECKING:
    from lightlm.data.tokenizer import Tokenizer

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
# (magic, version) -> token type. The first is llm.c's GPT-2 format; the second is its Llama 3 format.
FORMATS: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
LARGEST_UINT16_VOCABULARY = 65_536


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that a shard stores tokens of this vocabulary in: uint16, or uint32 past 65,536 entries."""
    return np.dtype("<u2") if vocab_size <= LARGEST_UINT16_VOCABULARY else np.dtype("<u4")


def shard_header(dtype: np.dtype[Any], count: int) -> bytes:
    """The 1,024 bytes that open a shard of `count` tokens."""
    magic, version = next(key for key, value in FORMATS.items() if value == dtype)
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write a 1-D array of token ids as a shard; the file appears whole or not at all.

    uint32 input gives the uint32 variant; any other integer type gives uint16.
    Raises ValueError for ids that the type does not hold.
    """
    dtype = np.dtype("<u4") if tokens.dtype == np.uint32 else np.dtype("<u2")
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(dtype).max):
        raise ValueError(f"token ids from {tokens.min()} to {tokens.max()} do not fit {dtype.name}")
    write_bytes(path, shard_header(dtype, tokens.size) + tokens.astype(dtype).tobytes())


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: uint16 or uint32 of shape (count,).

    Raises DataError for a file that is missing, is no shard, or is not as long as its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4", count=-1 if size >= HEADER_BYTES else 0)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Prepare the data again with --overwrite."
        ) from error
    if header.size < HEADER_INTS:
        raise DataError(
            f"{path}: {size} bytes long, and a shard's header alone takes {HEADER_BYTES}; not a token shard."
        )
    magic, version, count = (int(value) for value in header[:3])
    dtype = FORMATS.get((magic, version))
    if dtype is None:
        known = " or ".join(f"{m} version {v} ({d.name})" for (m, v), d in FORMATS.items())
        raise DataError(f"{path}: not a token shard: magic {magic} version {version} where {known} was expected.")
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        raise DataError(
            f"{path}: {size} bytes where the header's {count} tokens make {expected}; the file is truncated or "
            "damaged. Copy it again, or prepare the data again with --overwrite."
        )
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


class ShardEntry(BaseModel):
    """One shard in the manifest. `documents` counts the end-of-text tokens, that is the documents that end in it."""

    file: str
    split: Split
    tokens: int
    documents: int
    xxh3: str


class UnigramEntropy(BaseModel):
    """Cross-entropy of the validation tokens under the train unigram distribution: what a model must beat."""

    nats_per_token: float
    bits_per_byte: float


class MixedSource(BaseModel):
    """One source of a mixture: the share of tokens that was asked for, and what came of it."""

    source: str
    share: float
    reached: float
    tokens: int
    documents: int


class Manifest(BaseModel):
    """What `manifest.json` says of a data folder; `text_bytes` is UTF-8 bytes of text per split."""

    format: Literal[1] = 1
    source: str
    description: str
    revision: str | None
    tokenizer_sha256: str
    vocab_size: int
    end_of_text_id: int
    shards: list[ShardEntry]
    split_rule: str
    text_bytes: dict[Split, int]
    skipped_documents: int
    dropped: dict[str, int] = {}
    bad: list[str] = []
    flagged: dict[str, int] = {}
    listed: list[str] = []
    evaluation_sets: dict[str, dict[str, int]] = {}
    mixture: list[MixedSource] = []
    unigram: UnigramEntropy | None
    lightlm_version: str
    settings: dict[str, str | int | float | None]
    # Not in the file: set by `prepare` where it found the folder finished and left it alone.
    already_prepared: bool = Field(default=False, exclude=True)

    def tokens(self, split: Split) -> int:
        """Tokens in a split, end-of-text tokens included."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def documents(self, split: Split) -> int:
        """Documents in a split."""
        return sum(shard.documents for shard in self.shards if shard.split == split)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, over both splits."""
        return sum(self.text_bytes.values()) / max(1, sum(shard.tokens for shard in self.shards))


class TokenStream:
    """The shards of one split, end to end, as one long array of tokens that stays on disk."""

    def __init__(self, shards: list[np.ndarray], end_of_text_id: int) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])
        self.end_of_text_id = end_of_text_id

    def __len__(self) -> int:
        return int(self._starts[-1])

    def slice(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start`, across shard borders: int64 of shape (count,).

        Raises IndexError where the stream does not hold all of them.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of a stream of {len(self)}")
        out = np.empty(count, dtype=np.int64)
        done = 0
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            offset = start + done - int(self._starts[index])
            part = self._shards[index][offset : offset + count - done]
            out[done : done + len(part)] = part
            done += len(part)
            index += 1
        return out

    def documents(self) -> Iterator[np.ndarray]:
        """The int64 token ids of each document in order, without the end-of-text token.

        Works for shards that open each document with that token (modded-nanogpt) as well as for those that close it.
        """
        parts: list[np.ndarray] = []
        for start in range(0, len(self), 1 << 20):
            block = self.slice(start, min(1 << 20, len(self) - start))
            *closed, rest = np.split(block, np.flatnonzero(block == self.end_of_text_id) + 1)
            for piece in closed:
                document = np.concatenate([*parts, piece[:-1]])
                parts = []
                if document.size:
                    yield document
            parts.append(rest)
        tail = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        if tail.size:
            yield tail


class DataFolder:
    """A prepared data folder whose manifest, tokenizer and shards have been found to fit one another."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        streams: dict[Split, TokenStream],
        tokenizer: "Tokenizer | None" = None,
    ) -> None:
        """Without `tokenizer`, it is the folder's tokenizer.json."""
        self.path = path
        self.manifest = manifest
        self._streams = streams
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "DataFolder":
        """Open and check a data folder; checksums are left to `verify`, since they read every byte.

        A folder of shards that llm.c or modded-nanogpt wrote opens, too (see `lightlm.data.foreign`).
        Raises DataError naming what is missing or does not fit: the folder, the manifest, the tokenizer or a shard.
        """
        from lightlm.data.foreign import is_foreign, open_foreign

        folder = Path(path)
        if is_foreign(folder):
            return open_foreign(folder)
        manifest = read_manifest(folder)
        _check_tokenizer(folder, manifest)
        streams = {
            split: TokenStream(
                [_checked_shard(folder, manifest, entry) for entry in manifest.shards if entry.split == split],
                manifest.end_of_text_id,
            )
            for split in SPLITS
        }
        return cls(folder, manifest, streams)

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer that the shards were written with."""
        from lightlm.data.tokenizer import Tokenizer

        if self._tokenizer is not None:
            return self._tokenizer
        return Tokenizer.from_file(self.path / "tokenizer.json", end_of_text_id=self.manifest.end_of_text_id)

    def split(self, name: Split) -> TokenStream:
        """The token stream of `train` or `val`; it may be empty."""
        return self._streams[name]

    def verify(self) -> None:
        """Compare every shard with the manifest: checksum, documents, the range of ids; and look for stray shards and
        for missing ones.

        Raises DataError naming the first that differs.
        """
        manifest = read_manifest(self.path)  # a folder without one has nothing to be compared with
        known = {entry.file for entry in manifest.shards}
        stray = sorted(path.name for path in self.path.glob("*.bin") if path.name not in known)
        if stray:
            raise DataError(f"{self.path / stray[0]}: the manifest does not list this shard. Move it elsewhere.")
        for split in SPLITS:
            for number, name in enumerate(entry.file for entry in manifest.shards if entry.split == split):
                if name != f"{split}_{number:06d}.bin":
                    raise DataError(
                        f"{self.path / 'manifest.json'} lists {name} where {split}_{number:06d}.bin belongs. "
                        "Prepare the data again with --overwrite."
                    )
        for entry in manifest.shards:
            path = self.path / entry.file
            actual = checksum(path)
            if actual != entry.xxh3:
                raise DataError(
                    f"{path}: checksum {actual} where the manifest says {entry.xxh3}; the file has "
                    "changed since it was written. Copy it again, or prepare the data again with --overwrite."
                )
            documents, highest = _documents_and_highest(open_shard(path), manifest.end_of_text_id)
            if documents != entry.documents or highest >= manifest.vocab_size:
                raise DataError(
                    f"{path}: {documents} documents end in it and its highest token id is {highest}, where the "
                    f"manifest says {entry.documents} and a vocabulary of {manifest.vocab_size}. "
                    "Prepare the data again with --overwrite."
                )


def _documents_and_highest(tokens: np.ndarray, end_of_text_id: int) -> tuple[int, int]:
    """How many documents end in a shard, and its highest id; -1 for an empty one."""
    documents, highest = 0, -1
    for start in range(0, len(tokens), 1 << 24):
        block = tokens[start : start + (1 << 24)]
        documents += int(np.count_nonzero(block == end_of_text_id))
        highest = max(highest, int(block.max()))
    return documents, highest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder, without a look at its shards. Raises DataError with the command to run."""
    command = prepare_command(folder)
    if not folder.is_dir():
        raise DataError(f"There is no data folder {folder}. Make it with: {command}")
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder} has no manifest.json, so it is not a finished data folder. Make one with: {command}")
    try:
        return Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path}: {where}: {first['msg']}. Make the folder again with: {command} --overwrite"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON ({error}). Make the folder again with: {command} --overwrite"
        ) from error


def resolve_dataset(name_or_path: str) -> Path:
    """The folder that a recipe's `data.dataset` means: `data/<name>` for a bare name, else the path as given.

    A bare name has no separator and no leading dot: `./books` is the folder here. It falls back on a folder of that
    name here where there is none under data/. The folder need not exist: `DataFolder.open` says what to run.
    """
    given = Path(name_or_path)
    named = Path("data") / given
    bare = bool(name_or_path) and not name_or_path.startswith(".") and not set(name_or_path) & {"/", os.sep}
    return named if bare and (named.is_dir() or not given.is_dir()) else given


def dataset_reference(folder: Path) -> str:
    """What to write for `data.dataset` from this directory, so that `resolve_dataset` finds `folder` whatever else is
    there: its name if it lies in data/, else a path that cannot be taken for a name."""
    if folder.parent == Path("data") and not folder.name.startswith("."):
        return folder.name
    path = folder.as_posix()
    return path if "/" in path else f"./{path}"


def prepare_command(folder: Path) -> str:
    """Return the command that makes this data folder."""
    if folder.parent.name == "data":
        return f"lightlm prepare-data {shlex.quote(folder.name)}"
    return f"lightlm prepare-data SOURCE --out {shlex.quote(str(folder))}"


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    import hashlib

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; the tokens cannot be read without it. Copy it back from where it came.")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != manifest.tokenizer_sha256:
        raise DataError(
            f"{path} is not the tokenizer that these shards were written with: its sha256 is {actual}, and the "
            f"manifest says {manifest.tokenizer_sha256}. Restore the file, or prepare the data again with --overwrite."
        )


def _checked_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> np.ndarray:
    path = folder / entry.file
    tokens = open_shard(path)
    if len(tokens) != entry.tokens:
        raise DataError(
            f"{path}: its header counts {len(tokens)} tokens where the manifest says {entry.tokens}; "
            "the file is from another preparation. Copy it again, or prepare the data again with --overwrite."
        )
    if tokens.dtype != token_dtype(manifest.vocab_size):
        raise DataError(
            f"{path}: holds {tokens.dtype.name} tokens, which does not fit a vocabulary of {manifest.vocab_size}."
        )
    return tokens
