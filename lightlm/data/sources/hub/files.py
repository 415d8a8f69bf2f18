"""Files on the Hugging Face Hub, read in place by ranges; every range is asked for again where the network fails."""

import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from lightlm.data.sources.hub.client import HubError, first_line, hub_errors, persistently

# The most that one request asks for, and that a broken connection costs. Row groups of a thousand documents are one
# request; a row group that holds a whole file is many, and never in memory at once.
PIECE_BYTES = 8 << 20

# Where the Hub has sent this process for a file's content, by URL; the address is signed and expires. Without it, each
# row group would also cost a question to the Hub, which limits the questions of a client.
_locations: dict[str, str] = {}
_EXPIRED = (401, 403, 404, 410)


class _Status(NamedTuple):
    st_size: int


@dataclass(frozen=True)
class HubFile:
    """A file of a Hub data set at one commit, to the readers what a `pathlib.Path` is; it can be pickled.

    `size` is the one that the commit's listing gives, in bytes.
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
        return PurePosixPath(self.path).name

    @property
    def url(self) -> str:
        """As `datasets` and fsspec write it."""
        return f"hf://datasets/{self.repo}@{self.commit}/{self.path}"

    def stat(self) -> _Status:
        """The size, in bytes."""
        return _Status(self.size)

    def open(self, mode: str = "rb", buffering: int = -1) -> BinaryIO:
        """The file for reading; `buffering=0` turns each read into its own request. Reading raises HubError."""
        assert mode == "rb"
        raw = RemoteFile(self)
        return raw if buffering == 0 else io.BufferedReader(raw, PIECE_BYTES)  # type: ignore[return-value]


class RemoteFile(io.RawIOBase):
    """A HubFile as an unbuffered binary file. It holds no connection, so it needs no closing."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        """Fill the buffer as far as the file goes; returns the bytes read, 0 at the end."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._file.size - self._position))
        for start in range(0, wanted, PIECE_BYTES):
            piece = fetch(self._file, self._position + start, self._position + min(start + PIECE_BYTES, wanted))
            view[start : start + len(piece)] = piece
        self._position += wanted
        return wanted


def fetch(file: HubFile, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (exclusive) of a file. Raises HubError."""
    from lightlm.data.sources.hub.listing import refusal

    try:
        return persistently(f"Reading {file}", lambda: _request(file, start, end))
    except hub_errors() as error:
        meaning = refusal(file.repo, file.commit, error)
        raise meaning if isinstance(meaning, HubError) else HubError(f"{file}: {first_line(error)}") from error


def _request(file: HubFile, start: int, end: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import hf_raise_for_status

    url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit)
    # Compressed on its way, a range would not have the length that was asked for.
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    response = _ask(url, headers)
    hf_raise_for_status(response)
    content: bytes = response.content
    if response.status_code == 200 and len(content) == file.size:
        return content[start:end]  # a mirror that knows no ranges
    _check_version(file, [*response.history, response])
    if len(content) != end - start:
        raise ConnectionError(f"{len(content)} of {end - start} bytes came")
    if response.history:
        _locations[url] = str(response.url)
    return content


def _ask(url: str, headers: dict[str, str]) -> Any:
    """The answer to a request for a file, from the place that the Hub named last time if that still answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if url in _locations:
        response = get_session().get(_locations[url], headers=headers, timeout=seconds)
        if response.status_code not in _EXPIRED:
            return response
        _locations.pop(url, None)
    return get_session().get(url, headers={**build_hf_headers(), **headers}, timeout=seconds)


def _check_version(file: HubFile, answers: list[Any]) -> None:
    """Raise HubError where answers to a request (redirects, then content) tell of another commit or size."""
    commit = next((answer.headers["X-Repo-Commit"] for answer in answers if "X-Repo-Commit" in answer.headers), None)
    size = answers[-1].headers.get("Content-Range", "").rpartition("/")[2]
    if commit not in {None, file.commit} or (size.isdigit() and int(size) != file.size):
        raise HubError(
            f"{file} has {file.size:,} bytes at commit {file.commit}, but the Hub served {size or '?'} bytes of commit "
            f"{commit or 'unknown'}. If HF_ENDPOINT is a mirror, it may be out of date."
        )
