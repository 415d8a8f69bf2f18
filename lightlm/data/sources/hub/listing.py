"""The files of a configuration's train split, at one commit for a whole preparation.

`datasets` applies the rules by which patterns and folder names make splits, and finds the files. The configuration is
looked up here, in the repository's README, because `datasets` also expands the patterns of the first configuration:
for sample-10BT of fineweb-edu it would list the folder of every crawl.
"""

import functools
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightlm.data.sources.hub.client import (
    HubError,
    causes,
    first_line,
    hub_errors,
    persistently,
    quiet_libraries,
    within,
)
from lightlm.errors import DataError, LightLMError
from lightlm.files import write_text

SPLIT = "train"
PATHS_PER_REQUEST = 500  # for the sizes of files
LISTING_SECONDS = 300.0  # for one try to find the files: a request for each of some hundred folders, on a slow line
_NOT_OPTIONS = ("config_name", "data_files", "data_dir", "default", "description")


@dataclass(frozen=True)
class Listing:
    """The train split of a configuration.

    Attributes:
        commit: None for a local folder with the name of the data set, which `datasets` reads in place of the Hub.
        builder: the builder of `datasets` for the files: parquet, json, csv, text, ...
        options: the arguments of the builder, from the README.
        files: path in the repository and size in bytes of each file, in their order.
    """

    repo: str
    config: str | None
    commit: str | None
    builder: str
    options: dict[str, Any]
    files: list[tuple[str, int]]

    @property
    def label(self) -> str:
        return f"{self.repo}:{self.config}" if self.config else self.repo

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)

    def cached(self, path: str) -> Path | None:
        """Return the path of a file in the cache; None if it is not there."""
        from huggingface_hub import constants, try_to_load_from_cache

        found = try_to_load_from_cache(
            self.repo, path, cache_dir=constants.HF_HUB_CACHE, revision=self.commit, repo_type="dataset"
        )
        return Path(found) if isinstance(found, str) else None


def list_files(repo: str, config: str | None, revision: str) -> Listing:
    """Return the listing of `config` at the commit that `revision` (a branch, tag or commit) points to now.

    A local folder of that name takes precedence, as everywhere in `datasets`. Raises DataError where the configuration
    or its train split is missing, and HubError where the repository or the revision is missing or refused; the message
    lists what exists.
    """
    commit: str | None = None
    try:
        if not Path(repo).is_dir():
            commit = _commit(repo, revision)
        entry = _config_entry(repo, _configs(repo, commit), config)
        with quiet_libraries():
            find = functools.partial(_builder, repo, config, commit, entry)
            builder = persistently(f"Listing {repo}", lambda: within(LISTING_SECONDS, find))
        files = _files(repo, commit, builder.config.data_files or {})
    except hub_errors() as error:
        raise refusal(repo, commit or revision, error) from error
    options = {key: value for key, value in (entry or {}).items() if key not in _NOT_OPTIONS}
    return Listing(repo, config, commit, type(builder).__module__.rpartition(".")[2], options, files)


def _commit(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi, constants

    api, seconds = HfApi(endpoint=constants.ENDPOINT), constants.HF_HUB_DOWNLOAD_TIMEOUT
    look_up = functools.partial(api.dataset_info, repo, revision=revision, timeout=seconds)
    return str(persistently(f"Looking up {repo}", look_up).sha)


def _configs(repo: str, commit: str | None) -> list[dict[str, Any]]:
    """Return the configurations that the README declares, or an empty list.

    The README is fetched here first, because `datasets` takes a failed request for a repository without a README.
    """
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = Path(repo, "README.md")
    if commit is not None:
        fetch = functools.partial(hf_hub_download, repo, "README.md", repo_type="dataset", revision=commit)
        try:
            with quiet_libraries():
                path = Path(persistently(f"Reading the README of {repo}", fetch))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the Hub did not answer
                raise
            return []
    if not path.is_file():
        return []
    with quiet_libraries():  # no warning about a README without metadata
        declared = DatasetCard.load(path, ignore_metadata_errors=True).data.to_dict().get("configs")
    entries = declared if isinstance(declared, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and "config_name" in entry]


def _config_entry(repo: str, configs: Sequence[dict[str, Any]], config: str | None) -> dict[str, Any] | None:
    """Return the README's entry for `config`, or for the default one. Raises DataError where there is none."""
    if not configs:
        return None
    names = [str(entry["config_name"]) for entry in configs]
    if config is not None:
        if config not in names:
            raise DataError(f"{repo} has no configuration {config!r}; there are: {_shortened(names)}.")
        return configs[names.index(config)]
    default = [entry for entry in configs if entry.get("default") or entry["config_name"] == "default"]
    default.sort(key=lambda entry: not entry.get("default"))
    if not default and len(configs) > 1:
        raise DataError(f"{repo} has several configurations; name one as hf:{repo}:NAME: {_shortened(names)}.")
    return (default or list(configs))[0]


def _builder(repo: str, config: str | None, commit: str | None, entry: dict[str, Any] | None) -> Any:
    """Return the builder of `datasets`, which has found the files of the configuration."""
    import datasets

    name = entry["config_name"] if entry else config
    patterns = _train_patterns(entry.get("data_files")) if entry else None
    wanted = {} if patterns is None else {"data_files": {SPLIT: patterns}}
    if patterns is not None and entry is not None and entry.get("data_dir"):
        wanted["data_dir"] = entry["data_dir"]
    return datasets.load_dataset_builder(repo, name, revision=commit, **wanted)


def _train_patterns(declared: Any) -> list[str] | None:
    """Return the patterns of the train split in a README's `data_files`; None where the file names decide.

    Raises DataError where it declares only other splits.
    """
    if declared is None or isinstance(declared, str):
        return declared if declared is None else [declared]
    splits = {item["split"]: item["path"] for item in declared if isinstance(item, dict)}
    if not splits:
        return list(declared)
    if SPLIT not in splits:
        raise DataError(f"This configuration has no {SPLIT} split; there are: {', '.join(splits)}.")
    return [splits[SPLIT]] if isinstance(splits[SPLIT], str) else list(splits[SPLIT])


def _files(repo: str, commit: str | None, found: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """Return (path, size) of the train split's files, ordered as by `datasets`. Raises DataError if there are none."""
    if not found.get(SPLIT):
        raise DataError(f"{repo} has no {SPLIT} split in this configuration; there are: {', '.join(found) or 'none'}.")
    if commit is None:
        paths = [Path(os.path.relpath(path, repo)).as_posix() for path in found[SPLIT]]
        return [(path, Path(repo, path).stat().st_size) for path in paths]
    paths = [str(path).removeprefix(f"hf://datasets/{repo}@{commit}/") for path in found[SPLIT]]
    return list(zip(paths, _sizes(repo, commit, paths), strict=True))


def _sizes(repo: str, commit: str, paths: Sequence[str]) -> list[int]:
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    sizes: dict[str, int] = {}
    for start in range(0, len(paths), PATHS_PER_REQUEST):
        some = list(paths[start : start + PATHS_PER_REQUEST])
        ask = functools.partial(api.get_paths_info, repo, some, revision=commit, repo_type="dataset")
        entries = persistently(f"Listing {repo}", functools.partial(within, LISTING_SECONDS, ask))
        sizes.update({entry.path: entry.size for entry in entries})  # type: ignore[union-attr]
    return [sizes[path] for path in paths]


# The record of a download is in the repository's own folder of the cache, so that both are copied together.


def record_path(repo: str, config: str | None, revision: str) -> Path:
    """Return the file that keeps the listing of a downloaded data set."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "lightlm"
    name = urllib.parse.quote((config or "") + "@" + revision, safe="@")
    return folder / f"{name}.json"


def write_record(listing: Listing, revision: str) -> None:
    path = record_path(listing.repo, listing.config, revision)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(listing), indent=1))


def read_record(repo: str, config: str | None, revision: str) -> Listing | None:
    """Return the listing of a download that was begun; None where this version finds none that it can read."""
    path = record_path(repo, config, revision)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Listing(**{**record, "files": [(name, size) for name, size in record["files"]]})
    except (ValueError, TypeError, KeyError):  # another version of LightLM wrote it
        return None


# Messages


def refusal(repo: str, revision: str, error: BaseException) -> LightLMError:
    """Return one message for an error that will not pass."""
    from huggingface_hub import errors

    if isinstance(error, LightLMError):
        return error
    links = list(causes(error))
    kinds = tuple(type(link) for link in links)
    status = next((s for link in links if (s := getattr(getattr(link, "response", None), "status_code", None))), None)
    login = "Log in with `hf auth login`, or set HF_TOKEN."
    if errors.GatedRepoError in kinds:
        page = f"https://huggingface.co/datasets/{repo}"
        return HubError(f"{repo} is open only to those who accepted its terms, at {page}. Do that, then: {login}")
    if errors.RevisionNotFoundError in kinds:
        return HubError(f"{repo} has no branch, tag or commit {revision!r}. {_existing_revisions(repo)}")
    if status == 403:
        return HubError(f"The Hub refuses access to {repo} ({first_line(error)}). {login}")
    if errors.RepositoryNotFoundError in kinds or status in {401, 404}:
        return HubError(f"There is no data set {repo!r} on the Hub, or it is private. If it is: {login}")
    if "scripts are no longer supported" in str(error):
        return HubError(
            f"{repo} is a program, which `datasets` no longer runs. The Hub may hold its output as Parquet files: "
            f"try hf:{repo}@refs/convert/parquet"
        )
    return DataError(f"The data set {repo!r} cannot be opened: {first_line(error)}")


def _existing_revisions(repo: str) -> str:
    from huggingface_hub import HfApi, constants

    try:
        refs = HfApi(endpoint=constants.ENDPOINT).list_repo_refs(repo, repo_type="dataset")
    except hub_errors():
        return ""
    return f"There are: {_shortened([ref.name for ref in [*refs.branches, *refs.tags]])}."


def _shortened(names: Sequence[str], limit: int = 12) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
