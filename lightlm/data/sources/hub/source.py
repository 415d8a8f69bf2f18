"""Data sets on the Hugging Face Hub as a source: read in place at one commit, or from the cache."""

import functools
import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightlm.data.readers.files import file_units, missing_column
from lightlm.data.readers.texts import BadRecord, FilteredOut, Texts, Unit, pack, read_strings
from lightlm.data.select.filters import Filter
from lightlm.data.sources.hub.client import (
    HubError,
    back_off,
    first_line,
    hub_errors,
    persistently,
    quiet_libraries,
    require_hub,
)
from lightlm.data.sources.hub.files import HubFile
from lightlm.data.sources.hub.listing import Listing, list_files, read_record, refusal, write_record
from lightlm.data.sources.hub.names import HubRequest
from lightlm.errors import DataError

OFFLINE_HINT = (
    "What works offline: `lightlm prepare-data pydocs`, and local files or folders (`lightlm prepare-data PATH`)."
)


class HubSource:
    """The train split of a Hub data set.

    Parquet files are read by row groups and .jsonl files by blocks, in ranges over the network, so a unit fetches what
    it reads and no more, and nothing is stored. Files of other kinds are streamed whole by `datasets`, a unit each.
    Files that are in the Hub's cache are read there.
    """

    fingerprint = None

    def __init__(self, request: HubRequest, commit: str | None = None) -> None:
        self.name = request.name
        self.spec = request.spec
        self.description = f"{request.spec.removeprefix('hf:')} on the Hugging Face Hub"
        self._request = request
        self._commit = commit

    def at_revision(self, revision: str) -> "HubSource":
        """The same source at a commit that an earlier run has settled on, wherever its branch points now."""
        return HubSource(self._request, revision)

    @property
    def size(self) -> int:
        """Bytes of the files, all columns of them."""
        return self.listing.total_bytes

    @property
    def revision(self) -> str | None:
        """The commit that is read; None for a local folder of the data set's name."""
        return self.listing.commit

    @functools.cached_property
    def listing(self) -> Listing:
        """Settled at the first use, and the same from then on. Raises DataError or HubError."""
        from huggingface_hub import constants

        request, asked = self._request, self._request.revision or "main"
        if Path(request.repo).is_dir():
            return list_files(request.repo, request.config, asked)
        record = read_record(request.repo, request.config, asked)
        usable = record if record is not None and self._commit in {None, record.commit} else None
        if constants.HF_HUB_OFFLINE:
            return self._offline(usable)
        cached = usable is not None and all(usable.cached(path) for path, _ in usable.files)
        copy = "HF_HUB_OFFLINE=1 reads the copy in the cache. " if cached else ""
        require_hub(f"The data set {request.repo!r}", copy + OFFLINE_HINT)
        return list_files(request.repo, request.config, self._commit or asked)

    def _offline(self, record: Listing | None) -> Listing:
        from huggingface_hub import constants

        fetch = f"With a network, fetch it first: lightlm prepare-data {self.spec} --download-only"
        place = f"the cache at {constants.HF_HUB_CACHE}"
        if record is None:
            at = f" at commit {self._commit}" if self._commit else ""
            raise DataError(f"HF_HUB_OFFLINE is set, and {self.spec}{at} is not in {place}. {fetch}. {OFFLINE_HINT}")
        missing = [path for path, _ in record.files if record.cached(path) is None]
        if missing:
            raise DataError(
                f"HF_HUB_OFFLINE is set, and {len(missing)} of the {len(record.files)} files of {self.spec} are not in "
                f"{place}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. {fetch}."
            )
        return record

    def units(self) -> Iterator[Unit]:
        """The units in the order of the files. Their ids are paths in the repository, and places in the files."""
        listing, column, chosen = self.listing, self._request.text_column, self._request.chosen
        for path, size in listing.files:
            file = self._open(path, size)
            if _is_read_here(listing, path):
                yield from file_units(file, path, column, chosen)
            else:
                location = file.url if isinstance(file, HubFile) else str(file)
                stream = partial(_read_packed, listing, location, column, chosen)
                yield Unit(path, partial(read_strings, stream), size, stream)

    def _open(self, path: str, size: int) -> Path | HubFile:
        listing = self.listing
        if listing.commit is None:
            return Path(listing.repo, path).absolute()
        return listing.cached(path) or HubFile(listing.repo, listing.commit, path, size)

    def download(self) -> Listing:
        """Put the files into the Hub's cache, where later runs find them, also under HF_HUB_OFFLINE.

        What is there already stays; a broken download goes on where it stopped. Raises HubError or DataError.
        """
        listing = self.listing
        if listing.commit is None:
            raise DataError(f"{self.spec} is a folder here ({Path(listing.repo).resolve()}): nothing to download.")
        write_record(listing, self._request.revision or "main")
        wanted = [(path, size) for path, size in listing.files if listing.cached(path) is None]
        _check_room(sum(size for _, size in wanted))
        # One after another: Ctrl-C ends a download at once, which it would not with threads.
        with quiet_libraries(bars=True):
            for path, _ in wanted:
                _download(listing, path)
        return listing


def _is_read_here(listing: Listing, path: str) -> bool:
    """Whether our readers take the file; `datasets` takes the rest."""
    if listing.builder == "parquet":
        return path.lower().endswith(".parquet")
    lines = path.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))
    return lines and listing.builder == "json" and not listing.options


def _read_packed(
    listing: Listing, location: str, text_column: str, chosen: Filter | None, bad: BadRecord
) -> Iterator[Texts]:
    return pack(_read_rows(listing, location, text_column, chosen, bad))


def _read_rows(
    listing: Listing, location: str, text_column: str, chosen: Filter | None, bad: BadRecord
) -> Iterator[str]:
    """The texts of a file that `datasets` streams. After a failure the rows already given are passed over."""
    rows = failures = 0
    where = f"{listing.repo}/{location.rpartition('/')[2]}"
    while True:
        try:
            for row in itertools.islice(_stream(listing, location), rows, None):
                rows, failures = rows + 1, 0
                text = _text(row, where, text_column)
                if chosen is not None and not chosen.keeps(row, lambda: where):
                    bad(FilteredOut())
                elif text is not None:
                    yield text
            return
        except hub_errors() as error:
            failures += 1
            try:
                back_off(f"Reading {where}", error, failures)
            except hub_errors() as final:
                raise DataError(f"{where}: cannot be read after row {rows}: {first_line(final)}") from final


def _stream(listing: Listing, location: str) -> Any:
    import datasets

    with quiet_libraries():
        return datasets.load_dataset(
            listing.builder, data_files={"train": [location]}, split="train", streaming=True, **listing.options
        )


def _text(row: dict[str, Any], where: str, text_column: str) -> str | None:
    if text_column not in row:
        raise missing_column(where, text_column, list(row))
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{where}: the column {text_column!r} holds {type(text).__name__}, not text. "
            "Name the one with the text: --text-column NAME"
        )
    return text


def _download(listing: Listing, path: str) -> None:
    from huggingface_hub import constants, hf_hub_download

    def fetch() -> None:
        hf_hub_download(
            listing.repo, path, repo_type="dataset", revision=listing.commit, cache_dir=constants.HF_HUB_CACHE
        )

    try:
        persistently(f"Downloading {listing.repo}/{path}", fetch)
    except hub_errors() as error:
        meaning = refusal(listing.repo, str(listing.commit), error)
        where = f"{listing.repo}/{path} cannot be downloaded"
        raise meaning if isinstance(meaning, HubError) else DataError(f"{where}: {first_line(error)}") from error


def _check_room(wanted: int) -> None:
    """Raise DataError where the disk of the cache has less room than a download needs."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if wanted > free:
        raise DataError(
            f"The download needs {wanted / 1e9:,.1f} GB, and the disk of {cache} has {free / 1e9:,.1f} GB left. "
            "Set HF_HOME to a folder on a larger disk, or prepare without --download-only: that streams."
        )
