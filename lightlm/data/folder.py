"""The data folder: opening it, checking it, and finding it by name."""

import functools
import hashlib
import itertools
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from lightlm.data.foreign.folders import foreign_splits, read_foreign
from lightlm.data.shards import (
    MASK_BEGINS,
    MASK_SUFFIX,
    MASK_TRAINED,
    JoinedArrays,
    Manifest,
    ShardEntry,
    Split,
    TokenStream,
    open_mask,
    open_shard,
    streams_of,
    token_dtype,
)
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.folder import SETTINGS, read_settings
from lightlm.data.top_tokens import TEACHER_FOLDER, StoredTeacher, open_top_tokens, read_stored_teacher
from lightlm.errors import DataError
from lightlm.files import checksum

SHOWN_OF_CONVERSATION = 1_000  # tokens
SHOWN_TOKENS = 60  # of each document that `beginnings` shows
_PREPARED = ("manifest.json", "tokenizer.json")
SEARCH_TOKENS = 1 << 20  # a longer document is shown from its middle


class DataFolder:
    """A prepared data folder whose manifest, tokenizer and shards match."""

    def __init__(
        self, path: Path, manifest: Manifest, streams: dict[Split, TokenStream], tokenizer: Tokenizer | None = None
    ) -> None:
        """Take the checked parts of a folder; `tokenizer` is its tokenizer.json by default. See `open`."""
        self.path, self.manifest = path, manifest
        self._streams, self._tokenizer = streams, tokenizer

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "DataFolder":
        """Open and check a data folder, except for the checksums, which take a pass over the data (see `verify`).

        Also opens a folder of another program's shards (see `lightlm.data.foreign.folders`). Raises DataError naming
        what is missing or does not match: the folder, the manifest, the tokenizer or a shard.
        """
        folder = Path(path)
        foreign = read_foreign(folder)
        if foreign is not None:
            return cls(folder, *foreign)
        manifest = read_manifest(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path} is missing; without it the tokens cannot be decoded. Restore the file.")
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != manifest.tokenizer_sha256:
            raise DataError(
                f"{path} is not the tokenizer of these shards: its sha256 is {actual}, but "
                f"{manifest.tokenizer_sha256} in the manifest. Restore the file, or prepare the data again with "
                "--overwrite."
            )
        shards = {entry.file: _checked_shard(folder, manifest, entry) for entry in manifest.shards}
        if manifest.chat is not None:
            if "chat_template" not in read_settings(folder):
                raise DataError(f"{folder / SETTINGS} is missing or lacks the chat template. Restore the file.")
            shards |= {entry.file: open_mask(folder / entry.file, entry.tokens) for entry in manifest.chat.masks}
        return cls(folder, manifest, streams_of(manifest, shards))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards."""
        if self._tokenizer is not None:
            return self._tokenizer
        tokenizer = Tokenizer.from_file(self.path / "tokenizer.json", end_of_text_id=self.manifest.end_of_text_id)
        if self.manifest.chat is not None:
            tokenizer = tokenizer.used_as(None, False, read_settings(self.path), {})
        return tokenizer

    def split(self, name: Split) -> TokenStream:
        """Return the token stream of `train` or `val`; it may be empty."""
        return self._streams[name]

    def top_tokens(self) -> tuple[StoredTeacher, JoinedArrays]:
        """Return the teacher that is stored beside the train split; see `open_top_tokens` for errors."""
        return open_top_tokens(self.path, self.manifest)

    def verify(self) -> Manifest:
        """Compare the shards with the manifest, checksums included, and return the manifest.

        Raises DataError naming the first shard that has changed or that the manifest does not list.
        """
        manifest = read_manifest(self.path)  # raises for a foreign folder, which has none
        entries = [*manifest.shards, *(manifest.chat.masks if manifest.chat else [])]
        if read_stored_teacher(self.path) is not None:
            stored, _ = open_top_tokens(self.path, manifest)
            entries += [entry.model_copy(update={"file": f"{TEACHER_FOLDER}/{entry.file}"}) for entry in stored.shards]
        found = {path.name for pattern in ("*.bin", f"*{MASK_SUFFIX}") for path in self.path.glob(pattern)}
        stray = sorted(found - {entry.file for entry in entries})
        if stray:
            raise DataError(f"{self.path / stray[0]}: the manifest does not list this shard. Move it elsewhere.")
        for entry in entries:
            actual = checksum(self.path / entry.file)
            if actual != entry.xxh3:
                raise DataError(
                    f"{self.path / entry.file}: checksum {actual}, but {entry.xxh3} in the manifest; the file has "
                    "changed since it was written. Copy it again, or prepare the data again with --overwrite."
                )
        return manifest

    def beginnings(self, count: int) -> list[str]:
        """Return the first tokens of `count` documents of the train split, spread evenly over it, as text.

        Of conversations, all of them, with marks around the trained tokens. Without a train split, of the validation
        split.
        """
        stream, texts = self.split("train") or self.split("val"), []
        if stream.mask is not None:
            starts = stream.mask.find(MASK_BEGINS)
            bounds = [*starts.tolist(), len(stream)]
            numbers = dict.fromkeys(len(starts) * number // count for number in range(count))
            return [self._marked(stream, *bounds[n : n + 2]) for n in numbers] if len(starts) else []
        shown = set[int]()
        for number in range(count):
            position = len(stream) * number // count
            tokens = stream.slice(position, min(SEARCH_TOKENS, len(stream) - position))
            ends = np.flatnonzero(tokens[:-1] == stream.end_of_text_id) if number else np.zeros(0, np.int64)
            start = int(ends[0]) + 1 if ends.size else 0
            if position + start in shown:
                continue
            shown.add(position + start)
            beginning = tokens[start : start + SHOWN_TOKENS]
            stop = np.flatnonzero(beginning == stream.end_of_text_id)
            texts.append(self.tokenizer.decode(beginning[: stop[0]] if stop.size else beginning))
        return texts

    def _marked(self, stream: TokenStream, start: int, end: int) -> str:
        """Return a conversation, its trained tokens between ⟦ and ⟧; of a long one, the beginning."""
        assert stream.mask is not None
        count = min(end - start, SHOWN_OF_CONVERSATION)
        tokens, masks = stream.slice(start, count).tolist(), stream.mask.slice(start, count)
        text = ""
        for first, last, trained in _runs(masks):
            run = b"".join(map(self.tokenizer.bytes_of, tokens[first:last])).decode(errors="replace")
            text += f"⟦{run}⟧" if trained else run
        return text if count == end - start else f"{text} …"


def _runs(masks: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Yield the runs of tokens that are trained on, or not: (start, end, which)."""
    trained = (masks & MASK_TRAINED) != 0
    bounds = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(masks)]
    yield from ((start, end, bool(trained[start])) for start, end in itertools.pairwise(bounds))


def check_data_of_run(folders: Iterable[Path], run: Path, key: str) -> None:
    """Raise DataError if a data folder of a run that is to be resumed does not exist; `key` names the folders."""
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if not missing:
        return
    value = {"data.mix": "'{PATH: WEIGHT, ...}'", "data.stages": "'[...]'"}.get(key, "PATH")
    same = "" if key == "data.dataset" else " (with the same weights, in the same order)"
    raise DataError(
        f"There is no data folder {', '.join(missing)}, on which {run} was trained. If the folder has moved, say where "
        f"it is: lightlm train --resume {shlex.quote(str(run))} {key}={value}{same}"
    )


def check_prepared(folders: Iterable[Path], tokenizer: str | None = None) -> None:
    """Raise DataError with the commands to run if data folders were not prepared, without opening their shards.

    `tokenizer` names the one that they need, if not the default.
    """
    failed = []
    for folder in folders:
        try:
            if not foreign_splits(folder):
                read_manifest(folder, tokenizer)
        except DataError as error:
            failed.append(error)
    if failed:
        raise failed[0] if len(failed) == 1 else DataError("\n".join(map(str, failed)))


def prepared_beside(folders: Iterable[Path]) -> Path | None:
    """Return the first of a recipe's folders that is prepared: the others need its tokenizer. None if there is none."""
    return next((path for path in folders if all((path / name).is_file() for name in _PREPARED)), None)


def read_manifest(folder: Path, tokenizer: str | None = None) -> Manifest:
    """Return the manifest of a data folder, without checking its shards. Raises DataError with the command to run."""
    command = prepare_command(folder, tokenizer)
    if not folder.is_dir():
        raise DataError(f"There is no data folder {folder}. Make it with: {command}")
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder} has no manifest.json, so it is not a finished data folder. Make one with: {command}")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}." for part in first["loc"]).removesuffix(".") or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg']}. Make the folder again with: {command} --overwrite"
        ) from error


def resolve_dataset(name_or_path: str) -> Path:
    """Return the folder of a recipe's `data.dataset`: `data/<name>` for a bare name, else the path as given.

    A bare name has no separator and no leading dot: `./books` is a folder in the working directory. If data/ has no
    folder of that name and the working directory has one, returns the latter. The folder need not exist:
    `DataFolder.open` names the command that makes it.
    """
    given = Path(name_or_path)
    named = Path("data") / given
    bare = bool(name_or_path) and not name_or_path.startswith(".") and not set(name_or_path) & {"/", os.sep}
    return named if bare and (named.is_dir() or not given.is_dir()) else given


def dataset_reference(folder: Path) -> str:
    """Return the `data.dataset` that `resolve_dataset` resolves to `folder`, whatever other folders there are.

    Its name if it is in data/, else a path that is not a bare name.
    """
    if folder.parent == Path("data") and not folder.name.startswith("."):
        return folder.name
    path = folder.as_posix()
    return path if "/" in path else f"./{path}"


def prepare_command(folder: Path, tokenizer: str | None = None) -> str:
    """Return the command that makes a data folder, with this tokenizer or the default one."""
    chosen = "" if tokenizer is None else f" --tokenizer {shlex.quote(tokenizer)}"
    if folder.parent.name == "data":
        return f"lightlm prepare-data {shlex.quote(folder.name)}{chosen}"
    return f"lightlm prepare-data SOURCE --out {shlex.quote(str(folder))}{chosen}"


def _checked_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> np.ndarray:
    tokens, expected = open_shard(folder / entry.file), token_dtype(manifest.vocab_size)
    if (len(tokens), tokens.dtype) != (entry.tokens, expected):
        raise DataError(
            f"{folder / entry.file}: its header counts {len(tokens)} {tokens.dtype.name} tokens, the manifest "
            f"{entry.tokens} of {expected.name}; the file is from another preparation. Copy it again, or prepare the "
            "data again with --overwrite."
        )
    return tokens
