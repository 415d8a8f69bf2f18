"""Reaching the Hugging Face Hub, or saying at once and in one message that it cannot be reached.

The libraries retry an unreachable Hub for 24 s per request and print each attempt; a single probe answers in
at most `PROBE_SECONDS` (measured without a route: 0.05 s).
"""

import contextlib
import functools
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightlm.errors import DataError

PROBE_SECONDS = 5.0


def require_hub(wanted: str, alternative: str) -> None:
    """Return if the Hub can be reached.

    `wanted` names what is to be fetched and `alternative` says what works without a network.
    Raises DataError within `PROBE_SECONDS` otherwise, or at once where HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{wanted} is on the Hugging Face Hub, and HF_HUB_OFFLINE is set. {alternative}")
    reason = _unreachable(constants.ENDPOINT)
    if reason is not None:
        raise DataError(
            f"{wanted} is on the Hugging Face Hub, and {constants.ENDPOINT} cannot be reached ({reason}). {alternative}"
        )


def hub_answers() -> bool:
    """Whether the Hub can be reached, found out within `PROBE_SECONDS`; not asked where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _unreachable(constants.ENDPOINT) is None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE were set, which the libraries read from the environment only when they are imported."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@functools.cache
def _unreachable(endpoint: str) -> str | None:
    """Why `endpoint` gives no answer of any kind, or None; urllib heeds the proxy variables as the Hub does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # an error page is an answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # The Hub's client may trust certificates that urllib does not know: let it decide.
        return None if isinstance(reason, ssl.SSLError) else str(reason)


def hub_errors() -> tuple[type[BaseException], ...]:
    """What `datasets` and `huggingface_hub` raise for networks, missing repositories, formats and unknown options."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError's parent is the HTTP library's root error: requests or httpx, depending on the version.
    return OSError, ValueError, DatasetsError, HfHubHTTPError.__mro__[1]


@contextlib.contextmanager
def quiet_libraries(*others: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Keep the libraries' retry messages and progress bars off the terminal; LightLM reports both itself.

    Args:
        others: loggers to silence besides those of the Hub's libraries.
        level: what is still shown.
    """
    import datasets

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "fsspec", "httpx", *others)]
    before = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(level)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, previous in zip(loggers, before, strict=True):
            logger.setLevel(previous)
        if not bars:
            datasets.enable_progress_bars()


def download_tokenizer(repo: str, alternative: str) -> Path:
    """The path of a Hub repository's tokenizer.json in the local cache, downloaded if it is not there yet.

    Raises DataError where the Hub cannot be reached, or has no such repository or file.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, "tokenizer.json") if _is_repo(repo) else None
    if isinstance(cached, str):
        return Path(cached)
    require_hub(f"the tokenizer {repo!r}", alternative)
    try:
        with quiet_libraries():
            return Path(hf_hub_download(repo, "tokenizer.json"))
    except hub_errors() as error:
        raise DataError(
            f"the tokenizer.json of {repo!r} cannot be fetched: {first_line(error)}. {alternative}"
        ) from error


def load_streaming(repo: str, config: str | None, revision: str | None) -> Any:
    """The train split of a Hub data set as a streaming `datasets.IterableDataset`; nothing is downloaded yet.

    A relative folder of the same name takes precedence, as everywhere in `datasets`. Raises DataError.
    """
    import datasets

    try:
        with quiet_libraries():
            return datasets.load_dataset(repo, config, split="train", streaming=True, revision=revision)
    except hub_errors() as error:
        name = repo if config is None else f"{repo}:{config}"
        raise DataError(f"the data set {name!r} cannot be opened: {first_line(error)}") from error


def dataset_revision(repo: str) -> str | None:
    """The commit that a Hub data set's main branch points to now; None for a local folder of that name."""
    if os.path.isdir(repo):
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo, timeout=PROBE_SECONDS * 6).sha
    except hub_errors() as error:
        raise DataError(f"the data set {repo!r} cannot be found on the Hub: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The part of a library's message that fits in one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _is_repo(repo: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True
