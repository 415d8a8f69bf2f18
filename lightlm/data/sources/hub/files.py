"""Files on the Hugging Face Hub, read in place by ranges; a range is requested again where the network fails."""

import io
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, BinaryIO, Literal

from lightlm.data.sources.hub.client import HubError, first_line, hub_errors, persistently
from lightlm.data.sources.hub.listing import refusal

# The most that one request asks for, and that a broken connection costs. A row group of a thousand documents is one
# request. A row group that holds a whole file is many, and is never in memory as a whole.
REQUEST_BYTES = 8 << 20

# The address to which the Hub redirected this process for a file's content, by URL. It is signed and expires. Without
# it, each row group would cost one more request to the Hub, which limits the requests of a client.
_locations: dict[str, str] = {}
_EXPIRED = (401, 403, 404, 410)


@dataclass(frozen=True)
class HubFile:
    """A file of a Hub data set at one commit: a `lightlm.data.readers.file.File`. It can be pickled.

    `size` is in bytes, from the commit's listing.
    """

    repo: str
    commit: str
    path: str
    size: int

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    def stat(self) -> SimpleNamespace:
        """Return the size in bytes. The content never changes at one commit, so the time is 0."""
        return SimpleNamespace(st_size=self.size, st_mtime_ns=0)

    def open(self, mode: Literal["rb"], buffering: int = -1) -> BinaryIO:
        """Open the file; `buffering=0` turns each read into a request of its own. Reading raises HubError."""
        raw = RemoteFile(self)
        return raw if buffering == 0 else io.BufferedReader(raw, REQUEST_BYTES)  # type: ignore[return-value]


class RemoteFile(io.RawIOBase):
    """A HubFile as an unbuffered binary file. It holds no connection, so it need not be closed."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        """Fill the buffer as far as the file reaches; return the bytes read, 0 at the end."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._file.size - self._position))
        for start in range(0, wanted, REQUEST_BYTES):
            content = fetch(self._file, self._position + start, self._position + min(start + REQUEST_BYTES, wanted))
            view[start : start + len(content)] = content
        self._position += wanted
        return wanted


def fetch(file: HubFile, start: int, end: int) -> bytes:
    """Return bytes `start` to `end` (exclusive) of a file. Raises HubError."""
    try:
        return persistently(f"Reading {file}", lambda: _request(file, start, end))
    except hub_errors() as error:
        meaning = refusal(file.repo, file.commit, error)
        raise meaning if isinstance(meaning, HubError) else HubError(f"{file}: {first_line(error)}") from error


def _request(file: HubFile, start: int, end: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import hf_raise_for_status

    url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit)
    # A compressed range would not have the requested length.
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    response = _ask(url, headers)
    hf_raise_for_status(response)
    content: bytes = response.content
    if response.status_code == 200 and len(content) == file.size:
        return content[start:end]  # a mirror without ranges
    _check_version(file, [*response.history, response])
    if len(content) != end - start:
        raise ConnectionError(f"{len(content)} of {end - start} bytes arrived")
    if response.history:
        _locations[url] = str(response.url)
    return content


def _ask(url: str, headers: dict[str, str]) -> Any:
    """Return the response to a request for a file, from the address of the last redirect if that still answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if url in _locations:
        response = get_session().get(_locations[url], headers=headers, timeout=seconds)
        if response.status_code not in _EXPIRED:
            return response
        _locations.pop(url, None)
    return get_session().get(url, headers={**build_hf_headers(), **headers}, timeout=seconds)


def _check_version(file: HubFile, responses: list[Any]) -> None:
    """Raise HubError where the responses to a request (redirects, then content) name another commit or size."""
    commit = next((each.headers["X-Repo-Commit"] for each in responses if "X-Repo-Commit" in each.headers), None)
    size = responses[-1].headers.get("Content-Range", "").rpartition("/")[2]
    if commit not in {None, file.commit} or (size.isdigit() and int(size) != file.size):
        raise HubError(
            f"{file} has {file.size:,} bytes at commit {file.commit}, but the Hub served {size or '?'} bytes of commit "
            f"{commit or 'unknown'}. If HF_ENDPOINT is a mirror, it may be out of date."
        )
