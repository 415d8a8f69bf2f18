"""Download of the data sets of tasks, into the Hub's cache or a folder laid out like the Hub."""

import glob
import json
import re
from collections.abc import Callable
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

    def sizes(self) -> list[int]:
        """Ask the Hub for the files' sizes in bytes."""
        api = huggingface_hub.HfApi()
        return [
            entry.size
            for entry in api.get_paths_info(self.repo, self.files, revision=self.revision, repo_type="dataset")
            if isinstance(entry, huggingface_hub.hf_api.RepoFile)
        ]


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
    names = [str(file) for split in (builder.config.data_files or {}).values() for file in split]
    listing = _listing(names, builder.config.name)
    if Path(need.path).is_dir():  # `datasets` too prefers it to the Hub
        where, listing = Path(need.path).resolve(), None
    elif listing is not None and folder is not None:
        where = _into_folder(listing, folder / need.path)
    else:
        DataSets().load(need.path, need.name, **need.options)
        where = Path(builder.cache_dir)
    sizes = listing.sizes() if listing else [Path(name).stat().st_size for name in names if Path(name).is_file()]
    revision = listing.revision if listing else None
    return Fetched(need.tasks, need.path, need.name, revision, len(sizes), sum(sizes), str(where))


def _listing(names: list[str], config: str) -> _Listing | None:
    """Return the files of a data set on the Hub; None if it has other files."""
    matches = [match for name in names if (match := _ON_HUB.fullmatch(name))]
    if not matches or len(matches) < len(names):
        return None
    revision = unquote(matches[0]["revision"])  # refs/convert/parquet has slashes
    return _Listing(matches[0]["repo"], revision, config, sorted({match["file"] for match in matches}))


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
