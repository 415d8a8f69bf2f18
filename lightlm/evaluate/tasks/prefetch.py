"""Download of the data sets of tasks, into the Hub's cache or a folder laid out like the Hub."""

import glob
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
from datasets import load_dataset_builder
from huggingface_hub import DatasetCard
from huggingface_hub.errors import EntryNotFoundError

from lightlm import files
from lightlm.data.sources.hub.client import first_line, hub_errors, offline, persistently, require_hub
from lightlm.errors import DataError
from lightlm.evaluate.tasks.data_sets import RECORD, DataSets, commits_in
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.evaluate.tasks.needs import Need
from lightlm.evaluate.tasks.patches import quiet

_ON_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+(?:/[^/@]+)?)@(?P<revision>[^/]+)/(?P<file>.+)")
_CARD, _LEGACY_INFOS = "README.md", "dataset_infos.json"


@dataclass(frozen=True)
class Fetched:
    """A data set on this machine.

    Args:
        tasks: the tasks that need it.
        data_set, config: its name in lm-eval's tasks.
        revision: the Hub's commit; None if it is not a repository on the Hub.
        files, bytes: number and size of its data files.
        where: the folder that holds it.
    """

    tasks: list[str]
    data_set: str
    config: str | None
    revision: str | None
    files: int
    bytes: int
    where: str


@dataclass(frozen=True)
class _Listing:
    """The data files of a repository's configuration, at one commit."""

    repo: str
    revision: str
    config: str
    files: list[str]


def prefetch(tasks: Tasks, report: Callable[[str], None] = lambda line: None) -> list[Fetched]:
    """Fetch the data sets of the tasks, then load the tasks offline to check that nothing is missing.

    The data sets go to `tasks.data_sets.folder`, or without a folder to the cache. Files that are already there at the
    Hub's newest commit are not fetched again.

    Args:
        report: called with the title of each data set.

    Raises:
        DataError: the Hub does not answer, or some data sets are unavailable; the message lists these, and the others
            are fetched.
        HubError: the Hub fails repeatedly.
    """
    with quiet():
        needs = tasks.needs()
    folder = tasks.data_sets.folder
    if not all(DataSets().is_local(need) for need in needs):
        require_hub("The data of these tasks", "Fetch it on a machine with a connection and copy the folder here.")
    fetched, problems = [], []
    for need in needs:
        report(need.title)
        try:
            with quiet():
                fetched.append(persistently(f"Fetching {need.title}", partial(_fetch, need, folder)))
        except hub_errors() as error:
            problems.append(f"  {need.title}, for {', '.join(need.tasks)}: {first_line(error)}")
    if problems:
        raise DataError("\n".join([f"{len(problems)} of {len(needs)} data sets could not be fetched:", *problems]))
    tasks.data_sets = DataSets(folder)  # with nothing in memory
    with offline(), quiet():
        tasks.load(tasks.foreign)
    return fetched


def _fetch(need: Need, folder: Path | None) -> Fetched:
    builder = load_dataset_builder(need.path, need.name, **need.options)
    listing = _listing(builder)
    if Path(need.path).is_dir():  # `datasets` too prefers it to the Hub
        return Fetched(need.tasks, need.path, need.name, None, *_local_files(builder), str(Path(need.path).resolve()))
    if listing is not None and folder is not None:
        place = _into_folder(listing, folder / need.path)
        sizes = [(place / file).stat().st_size for file in listing.files]
        return Fetched(need.tasks, need.path, need.name, listing.revision, len(sizes), sum(sizes), str(place))
    DataSets().load(need.path, need.name, **need.options)
    if listing is None:
        return Fetched(need.tasks, need.path, need.name, None, *_local_files(builder), builder.cache_dir)
    sizes = [entry.size for entry in _sizes(listing)]
    return Fetched(need.tasks, need.path, need.name, listing.revision, len(sizes), sum(sizes), builder.cache_dir)


def _data_files(builder: Any) -> list[str]:
    return [str(file) for split in (builder.config.data_files or {}).values() for file in split]


def _listing(builder: Any) -> _Listing | None:
    """Return the files of a data set on the Hub; None if it has other files."""
    found = [_ON_HUB.fullmatch(file) for file in _data_files(builder)]
    matches = [match for match in found if match is not None]
    if not matches or len(matches) < len(found):
        return None
    paths = sorted({match["file"] for match in matches})
    revision = unquote(matches[0]["revision"])  # refs/convert/parquet has slashes
    return _Listing(matches[0]["repo"], revision, builder.config.name, paths)


def _local_files(builder: Any) -> tuple[int, int]:
    sizes = [Path(file).stat().st_size for file in _data_files(builder) if Path(file).is_file()]
    return len(sizes), sum(sizes)


def _sizes(listing: _Listing) -> Iterator[Any]:
    yield from huggingface_hub.HfApi().get_paths_info(
        listing.repo, listing.files, revision=listing.revision, repo_type="dataset"
    )


def _into_folder(listing: _Listing, place: Path) -> Path:
    """Download a configuration's data files to `place`, beside those of configurations fetched before."""
    huggingface_hub.snapshot_download(
        listing.repo,
        repo_type="dataset",
        revision=listing.revision,
        local_dir=place,
        allow_patterns=[glob.escape(name) for name in [*listing.files, _LEGACY_INFOS]],
    )
    card = _card(listing)
    if card is not None:
        _merge_card(place / _CARD, card, listing.config)
    commits = commits_in(place)
    files.write_text(place / RECORD, json.dumps({**commits, listing.config: listing.revision}, indent=2) + "\n")
    return place


def _card(listing: _Listing) -> str | None:
    try:
        path = huggingface_hub.hf_hub_download(listing.repo, _CARD, repo_type="dataset", revision=listing.revision)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def _merge_card(path: Path, theirs: str, config: str) -> None:
    """Write the Hub's description of a data set, with only the configurations whose files are here.

    `datasets` always looks for the files of the first listed configuration and fails if they are missing.
    """
    card = DatasetCard(theirs, ignore_metadata_errors=True)
    before = DatasetCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True) if path.is_file() else None
    for key in ("configs", "dataset_info"):
        entries = [entry for entry in _entries(card, key) if entry.get("config_name", "default") == config]
        kept = [entry for entry in _entries(before, key) if entry.get("config_name", "default") != config]
        if _entries(card, key):
            setattr(card.data, key, [*kept, *entries])
    files.write_text(path, str(card))


def _entries(card: DatasetCard | None, key: str) -> list[dict[str, Any]]:
    found = card.data.get(key) if card is not None else None
    return [found] if isinstance(found, dict) else found or []
