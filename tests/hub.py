"""A loopback Hugging Face Hub: the part of its API that `datasets` and `huggingface_hub` use, with faults on demand.

A repository is a local folder, taken in as a commit; a commit's id is a hash of its files, and `main` (or another
branch) points to the newest. What is served is modelled on huggingface.co as the clients see it: repository info,
trees in pages, paths-info, and `resolve`, which answers small files itself and sends Parquet files away (302) to a
"CDN" on another host name, where ranges are served. There are no xet headers, so clients use plain HTTP.

    with Hub() as hub:
        hub.add("HuggingFaceFW/fineweb-edu", folder)
        hub.faults.append(Fault("drop", r"GET /cdn/", times=2))
        subprocess.run(["lightlm", "prepare-data", "fineweb-edu"], env={**os.environ, "HF_ENDPOINT": hub.url})

As a program it serves one data set until it is interrupted:

    python -m tests.hub FOLDER HuggingFaceFW/fineweb-edu
"""

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

PAGE = 100  # entries of a tree listing in one answer; the Hub's is 1,000
CDN_SUFFIXES = (".parquet", ".gz", ".zst")  # what a repository keeps in large-file storage


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches the regular expression `match`.

    status: the answer is `status` instead, with a Retry-After of 0 seconds for 429.
    drop: the connection ends in the middle of the body.
    close: the connection ends before any answer.
    slow: the body stalls in its middle for `seconds`.
    short: a range is answered by its first half, as a whole answer.
    """

    kind: Literal["status", "drop", "close", "slow", "short"]
    match: str
    times: int = 1
    status: int = 500
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """A request as it was answered; `sent` counts the bytes of its body, all of them or a dropped half."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int


@dataclass
class Repository:
    """The files of each commit by path, and the commit that each branch or tag points to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False  # only requests with a token may read files

    def commit_of(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class Hub:
    """The server, which runs in a thread while the `with` block does."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}  # by "datasets/organization/name" or "models/organization/name"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.ranges = True  # False: a mirror that answers every request for a range with the whole file
        self.before_request: Callable[[str], None] | None = None  # called with "METHOD /path" before each answer
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn_url = f"http://localhost:{self.port}"  # another origin, to which a token must not travel
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, folder: Path, *, kind: str = "datasets", branch: str = "main") -> str:
        """Take the folder in as a new commit to which `branch` then points; earlier commits stay. Returns its id."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        digest = hashlib.sha1(repo.encode())
        for path, content in files.items():
            digest.update(f"\0{path}\0{len(content)}\0".encode() + content)
        commit = digest.hexdigest()
        repository = self.repositories.setdefault(f"{kind}/{repo}", Repository())
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def clear(self) -> None:
        """Forget the requests so far and the faults not yet used up."""
        with self.lock:
            self.requests.clear()
            self.faults.clear()

    def take_fault(self, line: str) -> Fault | None:
        """The first fault that matches a request, counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None

    def body_bytes(self, match: str) -> int:
        """Bytes of body that answers to GET requests on matching paths have carried."""
        return sum(
            request.sent for request in self.requests if request.method == "GET" and re.search(match, request.path)
        )


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._body = self.rfile.read(length)
        url = urllib.parse.urlsplit(self.path)
        self._query = urllib.parse.parse_qs(url.query)
        self._path = urllib.parse.unquote(url.path)
        line = f"{self.command} {self._path}"
        if self.hub.before_request is not None:
            self.hub.before_request(line)
        self._fault = self.hub.take_fault(line)
        if self._fault is not None and self._fault.kind == "close":
            self._record(0, 0)
            self.close_connection = True
        elif self._fault is not None and self._fault.kind == "status":
            headers = {"Retry-After": "0"} if self._fault.status == 429 else {}
            self._answer(self._fault.status, b"the server has a bad day", headers)
        else:
            self._route()

    def _route(self) -> None:
        if self._path.startswith("/cdn/"):
            self._cdn(self._path.removeprefix("/cdn/"))
        elif match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(.*))?", self._path):
            self._api(match[1], match[2], match[3] or "")
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(.+)", self._path):
            self._resolve("datasets" if match[1] else "models", match[2], match[3])
        else:
            self._answer(404 if self._path != "/" else 200, b"")

    # The API

    def _api(self, kind: str, repo: str, rest: str) -> None:
        repository = self.hub.repositories.get(f"{kind}/{repo}")
        if repository is None:
            # What huggingface.co says of a repository that is missing or private, to a client without a token.
            self._error(401, "", "Invalid username or password.")
            return
        what, _, place = rest.partition("/")
        commit, path = self._split(repository, place) if place else (repository.commit_of("main"), "")
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {place}")
        elif what in {"", "revision"}:
            self._json(self._info(repo, repository, commit))
        elif what == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.branches.items()]
            self._json({"branches": refs, "converts": [], "tags": []})
        elif what == "tree":
            self._tree(repository.commits[commit], path, self._query.get("recursive", ["false"])[0].lower() == "true")
        elif what == "paths-info":
            self._paths_info(repository.commits[commit])
        else:
            self._answer(404, b"")

    def _split(self, repository: Repository, place: str) -> tuple[str | None, str]:
        """The commit and the path of "revision/path"; a revision may have slashes (refs/convert/parquet)."""
        for revision in sorted({*repository.branches, *repository.commits}, key=len, reverse=True):
            if place == revision or place.startswith(f"{revision}/"):
                return repository.commit_of(revision), place[len(revision) + 1 :]
        return None, ""

    def _info(self, repo: str, repository: Repository, commit: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        common = {"_id": "0" * 24, "id": repo, "sha": commit, "private": False, "disabled": False, "tags": []}
        return {**common, "gated": "auto" if repository.gated else False, "downloads": 0, "siblings": siblings}

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        below = [path for path in files if path.startswith(prefix)]
        if folder and not below:
            self._error(404, "EntryNotFound", f"{folder} does not exist")
            return
        entries: dict[str, dict[str, Any]] = {}
        for path in below:
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                parent = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[parent] = {"type": "directory", "oid": _sha1(parent.encode()), "size": 0, "path": parent}
            if recursive or len(parts) == 1:
                entries[path] = _entry(path, files[path])
        start = int(self._query.get("cursor", ["0"])[0])
        listing = [entries[path] for path in sorted(entries)]
        headers = {}
        if start + PAGE < len(listing):
            query = urllib.parse.urlencode({**{k: v[0] for k, v in self._query.items()}, "cursor": start + PAGE})
            headers["Link"] = f'<{self.hub.url}{urllib.parse.quote(self._path)}?{query}>; rel="next"'
        self._json(listing[start : start + PAGE], headers)

    def _paths_info(self, files: dict[str, bytes]) -> None:
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(self._body)["paths"]
        else:
            wanted = urllib.parse.parse_qs(self._body.decode()).get("paths", [])
        entries = []
        for path in wanted:
            if path in files:
                entries.append(_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "oid": _sha1(path.encode()), "size": 0, "path": path})
        self._json(entries)

    # Files

    def _resolve(self, kind: str, repo: str, place: str) -> None:
        repository = self.hub.repositories.get(f"{kind}/{repo}")
        if repository is None:
            self._error(401, "RepoNotFound", "Repository not found")
            return
        commit, path = self._split(repository, place)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {place}")
        elif repository.gated and "Authorization" not in self.headers:
            self._error(401, "GatedRepo", f"Access to dataset {repo} is restricted.", {"X-Repo-Commit": commit})
        elif path not in repository.commits[commit]:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        else:
            content = repository.commits[commit][path]
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{_sha1(content)}"'}
            if not path.endswith(CDN_SUFFIXES):
                self._content(content, headers)
                return
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"'}
            where = urllib.parse.quote(f"/cdn/{kind}/{repo}/{commit}/{path}")
            self._answer(302, b"", headers | {"Location": f"{self.hub.cdn_url}{where}?signature=0"})

    def _cdn(self, place: str) -> None:
        if "Authorization" in self.headers:
            self._error(400, "", "a token was sent to another host")
            return
        kind, organization, name, commit, path = place.split("/", 4)
        content = self.hub.repositories[f"{kind}/{organization}/{name}"].commits[commit][path]
        self._content(content, {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or not (match[1] or match[2]) or not self.hub.ranges:
            self._answer(200, content, headers)
            return
        size = len(content)
        start = int(match[1]) if match[1] else max(0, size - int(match[2]))
        end = min(int(match[2]) + 1, size) if match[1] and match[2] else size
        if self._fault is not None and self._fault.kind == "short":
            end -= (end - start) // 2
        if start >= end:
            self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
        else:
            self._answer(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"})

    # Answers

    def _json(self, content: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._answer(status, body, {"X-Error-Message": message, **named, **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        fault = self._fault.kind if self._fault is not None else None
        half = len(body) // 2
        sent = b"" if self.command == "HEAD" else body[:half] if fault == "drop" else body
        self._record(status, len(sent))  # first, so that a test which has its answer finds the request
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            if fault == "slow":
                self.wfile.write(sent[:half])
                self.wfile.flush()
                time.sleep(self._fault.seconds if self._fault else 0)
                sent = sent[half:]
            self.wfile.write(sent)
        except OSError:  # the client has given up
            self.close_connection = True
        if fault == "drop":
            self.close_connection = True

    def _record(self, status: int, sent: int) -> None:
        request = Request(self.command, self._path, self.headers.get("Range"), status, sent)
        with self.hub.lock:
            self.hub.requests.append(request)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": _sha1(content), "size": len(content), "path": path}
    if path.endswith(CDN_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def main() -> None:
    folder, repo = sys.argv[1:]
    with Hub() as hub:
        commit = hub.add(repo, Path(folder))
        print(f"export HF_ENDPOINT={hub.url}   # {repo} at {commit}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
