"""Data sets on the Hugging Face Hub as a source: read in place at one commit, or from the cache."""

import functools
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lightlm.data.readers.records import texts_of
from lightlm.data.readers.registry import reader_of
from lightlm.data.readers.texts import BadRecord, Texts, Unit, pack
from lightlm.data.select.filters import Filter
from lightlm.data.sources.base import FileCounts
from lightlm.data.sources.folder_walk import kind_of, most_common
from lightlm.data.sources.hub.client import (
    HubError,
    first_line,
    hub_errors,
    may_pass,
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
    def file_counts(self) -> FileCounts:
        """The files of the train split, and the repository's others."""
        read = Counter(kind_of(path.rpartition("/")[2]) for path, _ in self.listing.files)
        return FileCounts(most_common(read), self.listing.left_out)

    @property
    def revision(self) -> str:
        """The commit that is read."""
        return self.listing.commit

    @functools.cached_property
    def listing(self) -> Listing:
        """The files, fixed at the first use. Raises DataError or HubError."""
        from huggingface_hub import constants

        request, asked = self._request, self._request.revision or "main"
        if Path(request.repo).is_dir():  # `datasets` would read it in place of the Hub
            raise DataError(
                f"{self.spec}: the folder {Path(request.repo).absolute()} has the name of this data set. Prepare the "
                f"folder as ./{request.repo}, or run the command in another folder"
            )
        if not constants.HF_HUB_OFFLINE:
            require_hub(f"The data set {request.repo!r}", f"HF_HUB_OFFLINE=1 reads what was downloaded. {OFFLINE_HINT}")
            return list_files(request.repo, request.config, self._commit or asked)
        record = read_record(request.repo, request.config, asked)
        at = f" at commit {self._commit}" if self._commit else ""
        subject, missing = f"{self.spec}{at} is", ""
        if record is not None and self._commit in {None, record.commit}:
            paths = [path for path, _ in record.files if record.cached(path) is None]
            if not paths:
                return record
            subject = f"{len(paths)} of the {len(record.files)} files of {self.spec} are"
            missing = f": {', '.join(paths[:5])}{', ...' if len(paths) > 5 else ''}"
        raise DataError(
            f"HF_HUB_OFFLINE is set, and {subject} not in the cache at {constants.HF_HUB_CACHE}{missing}. With a "
            f"network, fetch it first: lightlm prepare-data {self.spec} --download-only. {OFFLINE_HINT}"
        )

    def units(self) -> Iterator[Unit]:
        """Yield the units in the order of the files. Their ids are paths in the repository, and places in the files."""
        listing, column = self.listing, self._request.text_column
        for path, size in listing.files:
            file = listing.cached(path) or HubFile(listing.repo, listing.commit, path, size)
            if _is_read_here(listing, path):
                yield from reader_of(file).units(file, path, column, self._row_filter)
            else:
                yield Unit(path, partial(_read_streamed, listing, path, column, self._row_filter), size)

    def download(self) -> Listing:
        """Put the files into the Hub's cache, where later runs find them, also under HF_HUB_OFFLINE.

        Files that are there stay, and a broken download resumes. Raises HubError or DataError.
        """
        from huggingface_hub import constants, hf_hub_download

        listing, cache = self.listing, constants.HF_HUB_CACHE
        write_record(listing, self._request.revision or "main")
        wanted = {path: size for path, size in listing.files if listing.cached(path) is None}
        size, free = sum(wanted.values()), shutil.disk_usage(cache).free
        if size > free:
            raise DataError(
                f"The download needs {size / 1e9:,.1f} GB, and the disk of {cache} has {free / 1e9:,.1f} GB left. "
                "Set HF_HOME to a folder on a larger disk, or prepare without --download-only, which streams."
            )
        options = {"repo_type": "dataset", "revision": listing.commit, "cache_dir": cache}
        # In sequence: Ctrl-C ends a download at once, which it does not with threads.
        with quiet_libraries(bars=True):
            for path in wanted:
                fetch = partial(hf_hub_download, listing.repo, path, **options)
                try:
                    persistently(f"Downloading {listing.repo}/{path}", fetch)
                except hub_errors() as error:
                    raise refusal(listing.repo, listing.commit, error) from error
        return listing


def _is_read_here(listing: Listing, path: str) -> bool:
    """Return whether `lightlm.data.readers` reads the file; `datasets` reads the others."""
    if listing.builder == "parquet":
        return path.lower().endswith(".parquet")
    lines = path.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))
    return lines and listing.builder == "json" and not listing.options


def _read_streamed(
    listing: Listing, path: str, text_column: str, row_filter: Filter | None, bad: BadRecord
) -> Iterator[Texts]:
    """Yield the texts of a file that `datasets` streams; it repeats failed requests itself."""
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = 3  # each is six requests of huggingface_hub in 23 s
    where = f"{listing.repo}/{path}"
    location = str(listing.cached(path) or f"hf://datasets/{listing.repo}@{listing.commit}/{path}")
    try:
        with quiet_libraries():
            rows = datasets.load_dataset(
                listing.builder, data_files={"train": [location]}, split="train", streaming=True, **listing.options
            )
            records = ((partial("{}, row {}".format, where, number), row) for number, row in enumerate(rows, start=1))
            yield from pack(texts_of(records, text_column, row_filter, bad))
    except hub_errors() as error:
        kind = HubError if may_pass(error) else DataError
        raise kind(f"{where}: cannot be read: {first_line(error)}") from error
