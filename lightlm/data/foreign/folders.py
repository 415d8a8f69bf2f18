"""Folders of shards from other programs, which LightLM trains on as they are: a row of `_KINDS` for each program.

They have no manifest. Without a tokenizer of their own in the folder, they hold GPT-2's tokens, as in those programs.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from lightlm.data.foreign.tokenizers import tokenizer_in
from lightlm.data.shards import FORMATS, SPLITS, Manifest, ShardEntry, Split, TokenStream, open_shard, streams_of
from lightlm.data.sources.hub.client import download_tokenizer
from lightlm.data.tokenizer import Tokenizer, load_tokenizer
from lightlm.errors import DataError
from lightlm.files import refuse_lfs_pointer

CHECKED_TOKENS = 1_000_000  # of each shard; all 100M would take seconds
VAL_FRACTION, MIN_VAL_TOKENS = 0.005, 1_024  # as `prepare-data` takes from a source without validation documents
_INDEX, _METADATA = ".index", ".metadata"  # beside a file of datatrove
_LARGEST_METADATA = 1 << 16  # bytes


@dataclass(frozen=True)
class _Shard:
    """The tokens of a file; `ends` are those after each document, where the file's program wrote them."""

    tokens: np.ndarray
    ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    tokenizer: str = "gpt2"  # its name, where no file in the folder is one


@dataclass(frozen=True)
class _Kind:
    """The files of one program. The group `val` of the pattern matches in names of files for validation."""

    description: str
    names: re.Pattern[str]
    open: Callable[[Path], _Shard]
    splits_end: bool  # whether the end of the last shard is for validation if no file is


def _open_headed(path: Path) -> _Shard:
    return _Shard(open_shard(path))


def _open_plain(path: Path) -> _Shard:
    """Open a file of nanoGPT: uint16 without a header. Others give llm.c's files such names."""
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) == 8 and (int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")) in FORMATS:
        return _open_headed(path)
    return _Shard(_map(path, np.dtype("<u2")))


def _open_datatrove(path: Path) -> _Shard:
    """Open a file of datatrove: tokens without a header, with the ends of documents and the tokenizer beside it."""
    name, token_bytes, count = _read_metadata(path)
    index = path.with_name(path.name + _INDEX)
    ends = _map(index, np.dtype("<u8")) if index.is_file() else np.zeros(0, np.uint64)
    if token_bytes is None:  # the last document ends with the file
        sizes = {int(ends[-1]) * each: each for each in (2, 4)} if ends.size else {}
        token_bytes = sizes.get(path.stat().st_size, 2)
    tokens = _map(path, np.dtype(f"<u{token_bytes}"))
    said = int(ends[-1]) if ends.size else count
    if (said is not None and said != len(tokens)) or (np.diff(ends.astype(np.int64)) < 0).any():
        raise DataError(
            f"{path}: {len(tokens):,} tokens, but the files beside it say {said:,}; the file is cut off or damaged, or "
            "they are of another. Copy them again."
        )
    return _Shard(tokens, ends, name)


# The first whose names are in a folder.
_KINDS = (
    _Kind(
        "shards without a manifest, as llm.c and modded-nanogpt write them",
        re.compile(r".+_(?:train|(?P<val>val))_\d+\.bin"),
        _open_headed,
        splits_end=False,
    ),
    _Kind(
        "train.bin and val.bin, as nanoGPT writes them",
        re.compile(r"(?:train|(?P<val>val))\.bin"),
        _open_plain,
        splits_end=True,
    ),
    _Kind(
        "tokens of datatrove",
        re.compile(r"(?:(?P<val>(?:.+_)?(?:val|valid|validation)_.*)|.*)\.ds"),
        _open_datatrove,
        splits_end=True,
    ),
)


def read_foreign(folder: Path) -> tuple[Manifest, dict[Split, TokenStream], Tokenizer] | None:
    """Read a folder of another program's shards; None for another, or one with a manifest.

    The manifest says what is known without reading all shards: bytes of text are not counted, and documents only where
    the program wrote where they end. Raises DataError where a shard and the tokenizer do not match.
    """
    kind, splits = _recognize(folder)
    if kind is None:
        return None
    shards = {name: kind.open(folder / name) for name in splits}
    tokenizer = _tokenizer(folder, shards)
    for name, shard in shards.items():
        highest = int(shard.tokens[:CHECKED_TOKENS].max(initial=0))
        if highest >= tokenizer.vocab_size:
            raise DataError(
                f"{folder / name}: holds the token id {highest}, but the tokenizer has {tokenizer.vocab_size} entries; "
                f"copy the tokenizer.json of the shards into {folder}"
            )
    parts = [(name, split, shards[name]) for name, split in splits.items()]
    if cut := kind.splits_end and "val" not in splits.values():
        name, _, last = parts.pop()
        train, val = _cut(last, sum(len(shard.tokens) for shard in shards.values()), tokenizer.end_of_text_id)
        parts += [(name, "train", train), (f"{name} (end)", "val", val)]
    manifest = Manifest(
        source=str(folder),
        description=kind.description,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        shards=[
            ShardEntry(
                file=name,
                split=split,
                tokens=len(shard.tokens),
                documents=len(shard.ends),
                xxh3=_identity(folder / name.removesuffix(" (end)")),
            )
            for name, split, shard in parts
        ],
        split_rule="by the names of the files" + (", and the end of the last for validation" if cut else ""),
        text_bytes=dict.fromkeys(SPLITS, 0),
    )
    return manifest, streams_of(manifest, {name: shard.tokens for name, _, shard in parts}), tokenizer


def foreign_splits(folder: Path) -> dict[str, Split]:
    """Return the split of each shard by its file name; none for a folder of other files, or one with a manifest."""
    return _recognize(folder)[1]


def _recognize(folder: Path) -> tuple[_Kind | None, dict[str, Split]]:
    if (folder / "manifest.json").exists() or not folder.is_dir():
        return None, {}
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".ds"))
    for kind in _KINDS:
        matches = filter(None, map(kind.names.fullmatch, names))
        if splits := {match[0]: _split(match) for match in matches}:
            return kind, splits
    return None, {}


def _split(match: re.Match[str]) -> Split:
    return "train" if match["val"] is None else "val"


def _cut(shard: _Shard, total: int, end_of_text_id: int) -> tuple[_Shard, _Shard]:
    """Return a shard without its end, and the end: a share of all tokens, from where a document begins, if one does."""
    size = len(shard.tokens)
    least = min(MIN_VAL_TOKENS, math.ceil(total / 10))
    place = max(size - max(math.ceil(VAL_FRACTION * total), least), 0)
    middle = (place + size) // 2
    begins = shard.ends
    if not begins.size:
        begins = place + 1 + np.flatnonzero(shard.tokens[place:middle] == end_of_text_id).astype(np.uint64)
    near = begins[(begins >= place) & (begins <= middle)]
    if near.size:
        place = int(near[0])
    before = shard.ends <= place
    return (
        _Shard(shard.tokens[:place], shard.ends[before], shard.tokenizer),
        _Shard(shard.tokens[place:], shard.ends[~before] - place, shard.tokenizer),
    )


def _tokenizer(folder: Path, shards: dict[str, _Shard]) -> Tokenizer:
    tokenizer = tokenizer_in([folder])
    if tokenizer is not None:
        return _separated(tokenizer, shards.values())
    names = {shard.tokenizer for shard in shards.values()}
    name = min(names)
    if len(names) > 1:
        raise DataError(f"{folder} holds shards of the tokenizers {', '.join(sorted(names))}; take them apart")
    if name == "gpt2" and any(shard.tokens.dtype.itemsize > 2 for shard in shards.values()):
        raise DataError(f"{folder} holds uint32 shards and no tokenizer.json; copy the one of the shards there")
    whose = "GPT-2's" if name == "gpt2" else f"that of {name}"
    try:
        return _separated(load_tokenizer(name, download_tokenizer), shards.values())
    except DataError as error:
        raise DataError(f"{folder} holds no tokenizer.json, so its shards need {whose}. {error}") from error


def _separated(tokenizer: Tokenizer, shards: Iterable[_Shard]) -> Tokenizer:
    """Return the tokenizer with the special token that ends documents, where the shards say where they end."""
    last = {int(shard.tokens[end - 1]) for shard in shards for end in shard.ends[:100].astype(np.int64) if end}
    if len(last) != 1 or (found := last.pop()) == tokenizer.end_of_text_id or found not in tokenizer.special_tokens:
        return tokenizer
    other = Tokenizer(tokenizer.definition, origin="the tokenizer of the shards", end_of_text_id=found)
    return other.used_like(tokenizer)


def _read_metadata(path: Path) -> tuple[str, int | None, int | None]:
    """Return the tokenizer, the bytes of a token and the number of tokens; the last two are None without the file."""
    beside = path.with_name(path.name + _METADATA)
    if not beside.is_file():
        return "gpt2", None, None
    with beside.open("rb") as file:
        lines = file.read(_LARGEST_METADATA).decode("utf-8", errors="replace").splitlines()
    name, _, size = lines[0].rpartition("|") if lines else ("", "", "")
    if size not in ("2", "4") or len(lines) < 2 or not (lines[1].isascii() and lines[1].isdigit()):
        raise DataError(f"{beside} is not what datatrove writes: TOKENIZER|BYTES, then the number of tokens")
    return ("gpt2" if name.startswith("Unknown Tokenizer") else name), int(size), int(lines[1])


def _map(path: Path, dtype: np.dtype[np.unsignedinteger]) -> np.ndarray:
    """Return the numbers in a file without a header, memory-mapped."""
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: {size:,} bytes, which are not whole {dtype.name} numbers; the file is cut off or damaged. Copy "
            "it again."
        )
    return np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype)


def _identity(path: Path) -> str:
    """Hash the size and both ends of a shard, so that a run does not resume on other data."""
    digest = xxhash.xxh3_64(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()
