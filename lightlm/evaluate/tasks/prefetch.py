"""Fetching once what tasks read: into the Hub's cache, or into a folder laid out like the Hub."""

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
from lightlm.evaluate.runner import Tasks, quiet
from lightlm.evaluate.tasks.data_sets import RECORD, DataSets, commits_in
from lightlm.evaluate.tasks.needs import Need

_ON_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+(?:/[^/@]+)?)@(?P<revision>[^/]+)/(?P<file>.+)")
_CARD, _LEGACY_INFOS = "README.md", "dataset_infos.json"


@dataclass(frozen=True)
class Fetched:
    """A data set as it now lies on this machine.

    Args:
        tasks: which need it.
        data_set, config: as lm-eval's tasks name it.
        revision: the Hub's commit; None for one that is not a repository of the Hub.
        files, bytes: how many data files it has there, and their size.
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
    """The data files of one configuration of a repository, at one commit."""

    repo: str
    revision: str
    config: str
    files: list[str]


def prefetch(tasks: Tasks, report: Callable[[str], None] = lambda line: None) -> list[Fetched]:
    """Fetch the data sets of the tasks, and load the tasks without the Hub to see that nothing is missing.

    They go to `tasks.data_sets.folder`, or where there is none to the cache. What is there already at the Hub's
    newest commit is not fetched again.

    Args:
        report: told of each data set in turn.

    Raises:
        DataError: the Hub does not answer, or some cannot be had; the message lists these, and the others are fetched.
        HubError: the Hub fails repeatedly.
    """
    with quiet():
        needs = tasks.needs()
    folder = tasks.data_sets.folder
    if any(not _lies_here(need) for need in needs):
        require_hub("The data of these tasks", "Fetch it where there is a connection, and bring the folder here.")
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
    tasks.data_sets = DataSets(folder)  # without what is in memory
    with offline(), quiet():
        tasks.load(tasks.foreign)
    return fetched


def _fetch(need: Need, folder: Path | None) -> Fetched:
    builder = load_dataset_builder(need.path, need.name, **need.options)
    listing = _listing(builder)
    if Path(need.path).is_dir():  # comes before the Hub, to `datasets` too
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


def _lies_here(need: Need) -> bool:
    return DataSets().is_local(need)


def _data_files(builder: Any) -> list[str]:
    return [str(file) for split in (builder.config.data_files or {}).values() for file in split]


def _listing(builder: Any) -> _Listing | None:
    """What a data set of the Hub consists of; None for one of other files."""
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
    """The data files of one configuration below `place`, beside those of others fetched before."""
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
    """Write the Hub's description of a data set with only those configurations whose files are here.

    `datasets` looks for the files of the first one listed, whichever it is asked for, and fails where they are not.
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
