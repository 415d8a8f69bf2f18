"""The files of a configuration's train split, at one commit for a whole preparation.

`datasets` applies the rules by which patterns and folder names make splits, and finds the files. The configuration is
looked up here, in the repository's README, because `datasets` also expands the patterns of the first configuration:
for sample-10BT of fineweb-edu it would list the folder of every crawl.
"""

import functools
import json
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightlm.data.sources.folder_walk import kind_of, most_common
from lightlm.data.sources.hub.client import (
    HubError,
    causes,
    first_line,
    hub_errors,
    persistently,
    quiet_libraries,
    status_of,
)
from lightlm.errors import DataError, LightLMError
from lightlm.files import write_text

SPLIT = "train"
PATHS_PER_REQUEST = 500  # for the sizes of files
_NOT_OPTIONS = ("data_files", "data_dir", "default", "description", "features")


@dataclass(frozen=True)
class Listing:
    """The train split of a configuration.

    Attributes:
        builder: the builder of `datasets` for the files: parquet, json, csv, text, ...
        options: the arguments of the builder, from the README.
        files: path in the repository and size in bytes of each file, in their order.
        left_out: the repository's other files by suffix: of other splits and configurations, and files without data.
    """

    repo: str
    config: str | None
    commit: str
    builder: str
    options: dict[str, Any]
    files: list[tuple[str, int]]
    left_out: dict[str, int] = field(default_factory=dict)

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

    Raises DataError where the configuration or its train split is missing, and HubError where the repository or the
    revision is missing or refused; the message lists what exists.
    """
    from huggingface_hub import HfApi, constants

    api, seconds = HfApi(endpoint=constants.ENDPOINT), constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        look_up = functools.partial(api.dataset_info, repo, revision=revision, timeout=seconds)
        info = persistently(f"Looking up {repo}", look_up)
        commit = revision = str(info.sha)
        configs = _configs(repo, commit)
        name = _config_name(repo, configs, config)
        entry = configs.get(name or "", {})
        with quiet_libraries():
            find = functools.partial(_builder, repo, name, commit, entry)
            builder = persistently(f"Listing {repo}", find)
        found = builder.config.data_files or {}
        if SPLIT not in found:
            raise _no_train_split(repo, found)
        paths = [str(path).removeprefix(f"hf://datasets/{repo}@{commit}/") for path in found[SPLIT]]
        sizes: dict[str, int] = {}
        for start in range(0, len(paths), PATHS_PER_REQUEST):
            some = paths[start : start + PATHS_PER_REQUEST]
            ask = functools.partial(api.get_paths_info, repo, some, revision=commit, repo_type="dataset")
            sizes |= {each.path: getattr(each, "size", 0) for each in persistently(f"Listing {repo}", ask)}
    except hub_errors() as error:
        raise refusal(repo, revision, error) from error
    options = {key: value for key, value in entry.items() if key not in _NOT_OPTIONS}
    builder_name = type(builder).__module__.rpartition(".")[2]
    others = {file.rfilename for file in info.siblings or ()} - {*paths}
    left_out = most_common(Counter(kind_of(path.rpartition("/")[2]) for path in others))
    return Listing(repo, config, commit, builder_name, options, [(path, sizes[path]) for path in paths], left_out)


def _configs(repo: str, commit: str) -> dict[str, dict[str, Any]]:
    """Return the configurations that the README declares, by name.

    The README is fetched here first, because `datasets` takes a failed request for a repository without a README.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    fetch = functools.partial(hf_hub_download, repo, "README.md", repo_type="dataset", revision=commit)
    with quiet_libraries():  # no warning about a README without metadata
        try:
            card = DatasetCard.load(persistently(f"Reading the README of {repo}", fetch), ignore_metadata_errors=True)
        except LocalEntryNotFoundError:  # the Hub did not answer
            raise
        except EntryNotFoundError:
            return {}
    return MetadataConfigs.from_dataset_card_data(card.data)


def _config_name(repo: str, configs: Any, config: str | None) -> str | None:
    """Return the name of a configuration, or of the default one. Raises DataError where there is none."""
    if not configs:
        return config
    name: str | None = config or configs.get_default_config_name()
    if name is None:
        raise DataError(f"{repo} has several configurations; name one as hf:{repo}:NAME: {_shortened([*configs])}.")
    if name not in configs:
        raise DataError(f"{repo} has no configuration {name!r}; there are: {_shortened([*configs])}.")
    return name


def _builder(repo: str, name: str | None, commit: str, entry: Mapping[str, Any]) -> Any:
    """Return the builder of `datasets`, which has found the files of the configuration."""
    import datasets
    from datasets.data_files import sanitize_patterns

    wanted = {}
    if "data_files" in entry:
        patterns = sanitize_patterns(entry["data_files"])
        if SPLIT not in patterns:
            raise _no_train_split(repo, patterns)
        wanted = {"data_files": {SPLIT: patterns[SPLIT]}, "data_dir": entry.get("data_dir")}
    return datasets.load_dataset_builder(repo, name, revision=commit, **wanted)


def _no_train_split(repo: str, splits: Mapping[str, Any]) -> DataError:
    return DataError(f"This configuration of {repo} has no {SPLIT} split; there are: {', '.join(splits) or 'none'}.")


# The record of a download is in the repository's own folder of the cache, so that both are copied together.


def _record_path(repo: str, config: str | None, revision: str) -> Path:
    from huggingface_hub import constants

    name = urllib.parse.quote((config or "") + "@" + revision, safe="@")
    return Path(constants.HF_HUB_CACHE, f"datasets--{repo.replace('/', '--')}", "lightlm", f"{name}.json")


def write_record(listing: Listing, revision: str) -> None:
    path = _record_path(listing.repo, listing.config, revision)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(listing), indent=1))


def read_record(repo: str, config: str | None, revision: str) -> Listing | None:
    """Return the listing of a download that was begun; None where this version finds none that it can read."""
    try:
        return Listing(**json.loads(_record_path(repo, config, revision).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # TypeError: another version of LightLM wrote it
        return None


# Messages


def refusal(repo: str, revision: str, error: BaseException) -> LightLMError:
    """Return one message for an error that will not pass."""
    from huggingface_hub import errors

    if isinstance(error, LightLMError):
        return error
    kinds = [type(link) for link in causes(error)]
    status = status_of(error)
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
