"""Which files of a Hub data set hold a configuration's train split, at one commit that stays for a whole preparation.

`datasets` knows the rules by which patterns and folder names make splits, and finds the files. The configuration is
looked up here, in the repository's README, because `datasets` also expands the patterns of the first configuration:
for sample-10BT of fineweb-edu that is a listing of the folder of every crawl.
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
PATHS_AT_ONCE = 500  # in one question for the sizes of files
LISTING_SECONDS = 300.0  # for one try to find the files: a request for each of some hundred folders, on a slow line
_NOT_OPTIONS = ("config_name", "data_files", "data_dir", "default", "description")


@dataclass(frozen=True)
class Listing:
    """The train split of a configuration.

    Attributes:
        commit: None for a local folder of the data set's name, which `datasets` reads in place of the Hub.
        builder: what `datasets` reads the files with: parquet, json, csv, text, ...
        options: the builder's arguments, from the README.
        files: path in the repository, and size in bytes, in their order.
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
        """Where a file lies in the cache, if it does."""
        from huggingface_hub import constants, try_to_load_from_cache

        place = try_to_load_from_cache(
            self.repo, path, cache_dir=constants.HF_HUB_CACHE, revision=self.commit, repo_type="dataset"
        )
        return Path(place) if isinstance(place, str) else None


def list_files(repo: str, config: str | None, revision: str) -> Listing:
    """The listing of `config` at the commit that `revision` (a branch, tag or commit) points to now.

    A local folder of that name takes precedence, as everywhere in `datasets`. Raises DataError where the configuration
    or its train split is missing, and HubError where the repository or the revision is missing or refused; the message
    says what there is.
    """
    commit: str | None = None
    try:
        if not Path(repo).is_dir():
            commit = _commit(repo, revision)
        chosen = _choose(repo, _configs(repo, commit), config)
        with quiet_libraries():
            find = functools.partial(_builder, repo, config, commit, chosen)
            builder = persistently(f"Listing {repo}", lambda: within(LISTING_SECONDS, find))
        files = _files(repo, commit, builder.config.data_files or {})
    except hub_errors() as error:
        raise refusal(repo, commit or revision, error) from error
    options = {key: value for key, value in (chosen or {}).items() if key not in _NOT_OPTIONS}
    return Listing(repo, config, commit, type(builder).__module__.rpartition(".")[2], options, files)


def _commit(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi, constants

    api, seconds = HfApi(endpoint=constants.ENDPOINT), constants.HF_HUB_DOWNLOAD_TIMEOUT
    look_up = functools.partial(api.dataset_info, repo, revision=revision, timeout=seconds)
    return str(persistently(f"Looking up {repo}", look_up).sha)


def _configs(repo: str, commit: str | None) -> list[dict[str, Any]]:
    """The configurations that the README declares, or an empty list.

    The README is fetched before `datasets` does, which would take a failure for a repository without one.
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
            if isinstance(error, LocalEntryNotFoundError):  # not an answer, only none
                raise
            return []
    if not path.is_file():
        return []
    with quiet_libraries():  # a README without metadata is nothing to warn of
        declared = DatasetCard.load(path, ignore_metadata_errors=True).data.to_dict().get("configs")
    entries = declared if isinstance(declared, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and "config_name" in entry]


def _choose(repo: str, configs: Sequence[dict[str, Any]], config: str | None) -> dict[str, Any] | None:
    """The README's entry for `config`, or for the default one. Raises DataError where there is no such entry."""
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
        raise DataError(f"{repo} has several configurations, name one as hf:{repo}:NAME: {_shortened(names)}.")
    return (default or list(configs))[0]


def _builder(repo: str, config: str | None, commit: str | None, chosen: dict[str, Any] | None) -> Any:
    """The builder of `datasets`, which has found the files of the configuration."""
    import datasets

    name = chosen["config_name"] if chosen else config
    patterns = _train_patterns(chosen.get("data_files")) if chosen else None
    wanted = {} if patterns is None else {"data_files": {SPLIT: patterns}}
    if patterns is not None and chosen is not None and chosen.get("data_dir"):
        wanted["data_dir"] = chosen["data_dir"]
    return datasets.load_dataset_builder(repo, name, revision=commit, **wanted)


def _train_patterns(declared: Any) -> list[str] | None:
    """The patterns of the train split in a README's `data_files`; None where the file names decide.

    Raises DataError where it declares other splits alone.
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
    """(path, size) of the train split's files, in the order of `datasets`. Raises DataError where there are none."""
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
    for start in range(0, len(paths), PATHS_AT_ONCE):
        part = list(paths[start : start + PATHS_AT_ONCE])
        ask = functools.partial(api.get_paths_info, repo, part, revision=commit, repo_type="dataset")
        entries = persistently(f"Listing {repo}", functools.partial(within, LISTING_SECONDS, ask))
        sizes.update({entry.path: entry.size for entry in entries})  # type: ignore[union-attr]
    return [sizes[path] for path in paths]


# The record of a download lies in the repository's own folder of the cache, and so goes where that goes.


def record_path(repo: str, config: str | None, revision: str) -> Path:
    """Where the listing of a downloaded data set is kept."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "lightlm"
    name = urllib.parse.quote((config or "") + "@" + revision, safe="@")
    return folder / f"{name}.json"


def write_record(listing: Listing, revision: str) -> None:
    path = record_path(listing.repo, listing.config, revision)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(listing), indent=1))


def read_record(repo: str, config: str | None, revision: str) -> Listing | None:
    """The listing of a download that was begun; None where there was none that this version can read."""
    path = record_path(repo, config, revision)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Listing(**{**record, "files": [(name, size) for name, size in record["files"]]})
    except (ValueError, TypeError, KeyError):  # of another version of LightLM
        return None


# Messages


def refusal(repo: str, revision: str, error: BaseException) -> LightLMError:
    """What an error that will not pass means, in one message."""
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
    return DataError(f"the data set {repo!r} cannot be opened: {first_line(error)}")


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
