"""Download of the data sets of tasks, into the Hub's cache or a folder laid out like the Hub."""

import contextlib
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
from lightlm.evaluate.tasks.data_sets import RECORD, DataSets, Need, commits_in
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.evaluate.tasks.patches import quiet

_ON_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+(?:/[^/@]+)?)@(?P<revision>[^/]+)/(?P<file>.+)")


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
    matches = [match for name in names if (match := _ON_HUB.fullmatch(name))]
    if Path(need.path).is_dir() or not matches or len(matches) < len(names):  # `datasets` prefers a folder to the Hub
        DataSets().load(need.path, need.name, **need.options)
        where = Path(need.path).resolve() if Path(need.path).is_dir() else Path(builder.cache_dir)
        sizes = [Path(name).stat().st_size for name in names if Path(name).is_file()]
        return Fetched(need.tasks, need.path, need.name, None, len(sizes), sum(sizes), str(where))
    repo, revision = matches[0]["repo"], unquote(matches[0]["revision"])  # refs/convert/parquet has slashes
    found = sorted({match["file"] for match in matches})
    entries = huggingface_hub.HfApi().get_paths_info(repo, found, revision=revision, repo_type="dataset")
    sizes = [entry.size for entry in entries if isinstance(entry, huggingface_hub.hf_api.RepoFile)]
    if folder is None:
        DataSets().load(need.path, need.name, **need.options)
        where = Path(builder.cache_dir)
    else:
        where = folder / need.path
        _fetch_files(repo, revision, builder.config.name, found, where)
    return Fetched(need.tasks, need.path, need.name, revision, len(sizes), sum(sizes), str(where))


def _fetch_files(repo: str, revision: str, config: str, names: list[str], place: Path) -> None:
    """Download a configuration's data files to `place`, beside those of configurations fetched before.

    The Hub's description of the data set is written with only the configurations whose files are here: `datasets`
    always looks for the files of the first listed configuration and fails if they are missing.
    """
    wanted = [glob.escape(name) for name in [*names, "dataset_infos.json"]]
    huggingface_hub.snapshot_download(
        repo, repo_type="dataset", revision=revision, local_dir=place, allow_patterns=wanted
    )
    with contextlib.suppress(EntryNotFoundError):
        theirs = huggingface_hub.hf_hub_download(repo, "README.md", repo_type="dataset", revision=revision)
        card, ours = DatasetCard(Path(theirs).read_text("utf-8"), ignore_metadata_errors=True), place / "README.md"
        before = DatasetCard(ours.read_text("utf-8"), ignore_metadata_errors=True) if ours.is_file() else None
        for key in ("configs", "dataset_info"):
            if fetched := _entries(card, key):
                kept = [entry for entry in _entries(before, key) if entry.get("config_name", "default") != config]
                kept += [entry for entry in fetched if entry.get("config_name", "default") == config]
                setattr(card.data, key, kept)
        files.write_text(ours, str(card))
    files.write_text(place / RECORD, json.dumps({**commits_in(place), config: revision}, indent=2) + "\n")


def _entries(card: DatasetCard | None, key: str) -> list[dict[str, Any]]:
    found = card.data.get(key) if card is not None else None
    return [found] if isinstance(found, dict) else found or []
