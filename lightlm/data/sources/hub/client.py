"""Requests to the Hugging Face Hub: one clear message where it cannot be reached, and retries where it fails.

The libraries retry an unreachable Hub for 24 s per request and print each attempt; a single probe answers in at most
`PROBE_SECONDS` (measured without a route: 0.05 s). What fails after that is retried: see `persistently`.
"""

import contextlib
import functools
import http.client
import logging
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lightlm.data.tokenizer.folder import ADDED, CHAT_TEMPLATE, COMPANIONS, DEFINITION, MERGES, VOCABULARY
from lightlm.errors import DataError, LightLMError
from lightlm.names import warn

PROBE_SECONDS = 5.0

# Seconds before the second, third, ... try: five tries in a minute outlast a restarted gateway or a dropped line.
RETRY_DELAYS = (1.0, 4.0, 15.0, 40.0)
LONGEST_DELAY = 300.0  # the window of the Hub's rate limit; its answers name the seconds that are left of it
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")

T = TypeVar("T")
_log = logging.getLogger(__name__)


class HubError(LightLMError):
    """The Hub failed repeatedly, refuses access, or served something else than was requested.

    It is not a DataError, because --skip-bad must not skip it.
    """


def persistently(what: str, action: Callable[[], T]) -> T:
    """Return the result of `action`; retry it after each of `RETRY_DELAYS` while it fails for reasons that may pass.

    huggingface_hub's `http_backoff` repeats one HTTP request; an action here is a whole call of the Hub's libraries,
    most of which do not use it. `what` begins the messages, for example "Reading org/name/file.parquet". Raises
    HubError when the last try fails, and an error that will not pass (a missing file, a refused token) as it is.
    """
    failures = 0
    while True:
        try:
            return action()
        except hub_errors() as error:
            failures += 1
            if not may_pass(error):
                raise
            if failures > len(RETRY_DELAYS):
                raise HubError(
                    f"{what} from the Hugging Face Hub failed {failures} times in a row ({first_line(error)}). "
                    "Rerun the same command when the connection is better."
                ) from error
            delay = max(RETRY_DELAYS[failures - 1], min(_requested_delay(error), LONGEST_DELAY))
            level = logging.WARNING if failures > 1 else logging.INFO  # a single failure per hour is normal
            _log.log(level, f"{what} failed ({first_line(error)}); retrying in {delay:.0f} s")
            time.sleep(delay)


def may_pass(error: BaseException) -> bool:
    """Return whether an error of the Hub's libraries, or one of its causes, may pass within a minute."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    links = list(causes(error))
    if any(isinstance(link, OfflineModeIsEnabled) for link in links):
        return False
    status = status_of(error)
    if status is not None:
        return status in PASSING_STATUSES
    return any(
        isinstance(link, ConnectionError | TimeoutError)
        or type(link).__module__.partition(".")[0] in _NETWORK_LIBRARIES
        # httpx raises it for a client that another thread closed after an error of its own.
        or "client has been closed" in str(link)
        for link in links
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException) -> Any:
    responses = (getattr(link, "response", None) for link in causes(error))
    return next((response for response in responses if response is not None), None)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the response that an error is about; None where there was no response."""
    return getattr(_response(error), "status_code", None)


def _requested_delay(error: BaseException) -> float:
    """Return the seconds that the response asks to wait (Retry-After, or the reset of the Hub's rate limit), or 0."""
    headers = getattr(_response(error), "headers", {})
    after = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
    reset = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(max(int(match[1]) if match else 0 for match in (after, reset)))


def require_hub(wanted: str, alternative: str) -> None:
    """Raise DataError if the Hub cannot be reached: within `PROBE_SECONDS`, at once where HF_HUB_OFFLINE is set.

    `wanted` names what is to be fetched, and `alternative` says what works without a network.
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
    """Return whether the Hub can be reached, within `PROBE_SECONDS`; no request is made where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _unreachable(constants.ENDPOINT) is None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Set the libraries' HF_HUB_OFFLINE, which they read from the environment only when they are imported."""
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
    """Return why `endpoint` does not answer, or None; urllib follows the proxy variables as the Hub's client does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS):
            return None
    except (urllib.error.HTTPError, http.client.RemoteDisconnected):
        return None  # an error page is an answer, and after a dropped connection the next one may work
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # The Hub's client may trust certificates that urllib does not, so it decides.
        return None if isinstance(reason, ssl.SSLError) else str(reason)


def hub_errors() -> tuple[type[BaseException], ...]:
    """Return the errors of `datasets` and `huggingface_hub` for networks, missing repositories, formats and options."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError's parent is the root error of the HTTP library: requests or httpx, depending on the version.
    # `datasets` raises RuntimeError for a repository whose data a program generates.
    return OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError.__mro__[1]


@contextlib.contextmanager
def quiet_libraries(*others: str, level: int = logging.CRITICAL, bars: bool = False) -> Iterator[None]:
    """Hide the libraries' retry messages and progress bars; LightLM reports both itself.

    Args:
        others: loggers to silence in addition to those of the Hub's libraries.
        level: the lowest level that is still shown.
        bars: show the Hub's own progress bars of downloads.
    """
    import datasets
    from huggingface_hub import utils

    names = ("huggingface_hub", "datasets", "fsspec", "httpx", *others)
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    libraries = (datasets,) if bars else (datasets, utils)
    shown = [library for library in libraries if not library.are_progress_bars_disabled()]
    for logger in levels:
        logger.setLevel(level)
    for library in shown:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for logger, before in levels.items():
            logger.setLevel(before)
        for library in shown:
            library.enable_progress_bars()


def download_tokenizer(repo: str, alternative: str) -> Path:
    """Return the folder in the local cache with the tokenizer of a Hub repository; download what is not there.

    It holds tokenizer.json, or vocab.json and merges.txt, and the files that name special tokens. Raises DataError
    where the Hub cannot be reached, or has no such repository or tokenizer.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    cached = None
    with contextlib.suppress(HFValidationError):  # the download reports it
        found = (try_to_load_from_cache(repo, name) for name in (DEFINITION, MERGES))
        cached = next((Path(path).parent for path in found if isinstance(path, str)), None)
        # The cache also knows what a repository lacks. Another program may have fetched only tokenizer.json.
        unknown = [name for name in (*COMPANIONS, CHAT_TEMPLATE) if try_to_load_from_cache(repo, name) is None]
        if cached is not None and not unknown:
            return cached
    try:
        return _fetch_tokenizer(repo, alternative)
    except DataError as error:
        if cached is None:
            raise
        warn(
            f"the tokenizer of {repo} is read without {', '.join(unknown)}, which may name the end-of-text token and "
            f"the chat template: the Hub's cache lacks them, and they cannot be fetched ({first_line(error)})"
        )
        return cached


def _fetch_tokenizer(repo: str, alternative: str) -> Path:
    """Download what the local cache lacks of a tokenizer; see `download_tokenizer`."""
    require_hub(f"the tokenizer {repo!r}", alternative)
    try:
        with quiet_libraries():
            for name in (*COMPANIONS, CHAT_TEMPLATE, DEFINITION):
                path = _download_if_there(repo, name)
            for name in (ADDED, VOCABULARY, MERGES) if path is None else ():
                path = _download_if_there(repo, name)
    except hub_errors() as error:
        raise DataError(f"The tokenizer of {repo!r} cannot be fetched: {first_line(error)}. {alternative}") from error
    if path is None:
        raise DataError(f"{repo!r} on the Hub has neither {DEFINITION} nor {VOCABULARY} and {MERGES}. {alternative}")
    return path.parent


def _download_if_there(repo: str, name: str) -> Path | None:
    """Return the path of a file in the local cache; None where the repository does not have it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(persistently(f"Fetching {name} of {repo!r}", functools.partial(hf_hub_download, repo, name)))
    except LocalEntryNotFoundError:  # the Hub did not answer
        raise
    except EntryNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without its final period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
