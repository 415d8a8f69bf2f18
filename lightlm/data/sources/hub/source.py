"""Data sets on the Hugging Face Hub as a source: read in place at one commit, or from the cache."""

import functools
import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightlm.data.readers.files import reader_of
from lightlm.data.readers.records import text_of
from lightlm.data.readers.texts import BadRecord, Texts, Unit, pack
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
from lightlm.data.sources.hub.names import HubRequest, parse_hub
from lightlm.errors import DataError

OFFLINE_HINT = (
    "These work offline: `lightlm prepare-data pydocs`, and local files or folders (`lightlm prepare-data PATH`)."
)


def open_hub(spec: str, text_column: str, row_filter: Filter | None) -> "HubSource":
    """Return a data set on the Hub; see `lightlm.data.sources.base.Opener`."""
    return HubSource(parse_hub(spec, text_column), row_filter)


class HubSource:
    """The train split of a Hub data set.

    Parquet files are read by row groups and .jsonl files by blocks, in ranges over the network: a unit fetches only
    what it reads, and nothing is stored. `datasets` streams files of other types, each as one unit. Files in the Hub's
    cache are read there.
    """

    fingerprint = None

    def __init__(self, request: HubRequest, row_filter: Filter | None = None, commit: str | None = None) -> None:
        self.name = request.name
        self.spec = request.spec
        self.description = f"{request.spec.removeprefix('hf:')} on the Hugging Face Hub"
        self._request, self._row_filter = request, row_filter
        self._commit = commit

    def at_revision(self, revision: str) -> "HubSource":
        """Return the same source at the commit of an earlier run, wherever its branch points now."""
        return HubSource(self._request, self._row_filter, revision)

    @property
    def size(self) -> int:
        """Bytes of the files, with all their columns."""
        return self.listing.total_bytes

    @property
    def revision(self) -> str | None:
        """The commit that is read; None for a local folder with the name of the data set."""
        return self.listing.commit

    @functools.cached_property
    def listing(self) -> Listing:
        """The files, fixed at the first use. Raises DataError or HubError."""
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
        """Yield the units in the order of the files. Their ids are paths in the repository, and places in the files."""
        listing, column = self.listing, self._request.text_column
        for path, size in listing.files:
            file = self._open(path, size)
            if _is_read_here(listing, path):
                yield from reader_of(file).units(file, path, column, self._row_filter)
            else:
                location = file.url if isinstance(file, HubFile) else str(file)
                yield Unit(path, partial(_read_streamed, listing, location, column, self._row_filter), size)

    def _open(self, path: str, size: int) -> Path | HubFile:
        listing = self.listing
        if listing.commit is None:
            return Path(listing.repo, path).absolute()
        return listing.cached(path) or HubFile(listing.repo, listing.commit, path, size)

    def download(self) -> Listing:
        """Put the files into the Hub's cache, where later runs find them, also under HF_HUB_OFFLINE.

        Files that are there stay, and a broken download resumes. Raises HubError or DataError.
        """
        listing = self.listing
        if listing.commit is None:
            raise DataError(f"{self.spec} is a local folder ({Path(listing.repo).resolve()}); nothing to download.")
        write_record(listing, self._request.revision or "main")
        wanted = [(path, size) for path, size in listing.files if listing.cached(path) is None]
        _check_room(sum(size for _, size in wanted))
        # In sequence: Ctrl-C ends a download at once, which it does not with threads.
        with quiet_libraries(bars=True):
            for path, _ in wanted:
                _download(listing, path)
        return listing


def _is_read_here(listing: Listing, path: str) -> bool:
    """Whether `lightlm.data.readers` reads the file; `datasets` reads the others."""
    if listing.builder == "parquet":
        return path.lower().endswith(".parquet")
    lines = path.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))
    return lines and listing.builder == "json" and not listing.options


def _read_streamed(
    listing: Listing, location: str, text_column: str, row_filter: Filter | None, bad: BadRecord
) -> Iterator[Texts]:
    return pack(_streamed(listing, location, text_column, row_filter, bad))


def _streamed(
    listing: Listing, location: str, text_column: str, row_filter: Filter | None, bad: BadRecord
) -> Iterator[str]:
    """Yield the records of a file that `datasets` streams. After a failure, skip the rows that were already read."""
    rows = failures = 0
    where = f"{listing.repo}/{location.rpartition('/')[2]}"
    while True:
        try:
            for row in itertools.islice(_stream(listing, location), rows, None):
                rows, failures = rows + 1, 0
                text = text_of(row, lambda: where, text_column, row_filter, bad)
                if text is not None:
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
    """Raise DataError where the disk of the cache has less space than a download needs."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if wanted > free:
        raise DataError(
            f"The download needs {wanted / 1e9:,.1f} GB, and the disk of {cache} has {free / 1e9:,.1f} GB left. "
            "Set HF_HOME to a folder on a larger disk, or prepare without --download-only, which streams."
        )
