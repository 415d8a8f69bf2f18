"""Uploads to a local server that answers huggingface_hub as the Hub does; nothing here reaches the Hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightlm.convert.huggingface.hub import check_license, check_upload, upload
from lightlm.errors import ConvertError, UsageError

TOKEN = "hf_" + "x" * 20


class FakeHub:
    """A Hub with one user. `refuses` answers all requests with a status; `public` are repositories that exist."""

    def __init__(self, refuses: int = 0, public: tuple[str, ...] = ()) -> None:
        self.refuses, self.repositories = refuses, dict.fromkeys(public, False)  # whether each is private
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "/me/" in self.path:  # a thread that another test has left may ask for something else
                    outer.tokens.add(self.headers.get("authorization"))
                name = self.path.removeprefix("/api/models/").partition("?")[0]
                if outer.refuses:
                    return self.answer({"error": "no"}, outer.refuses)
                return self.answer({"id": name, "private": outer.repositories.get(name), "siblings": [], "tags": []})

            def do_POST(self) -> None:
                outer.tokens.add(self.headers.get("authorization"))
                body = self.rfile.read(int(self.headers["content-length"]))
                if outer.refuses:
                    self.answer({"error": "no"}, outer.refuses)
                elif self.path == "/api/repos/create":
                    given = json.loads(body)
                    name = f"{given['organization']}/{given['name']}"
                    exists = name in outer.repositories
                    outer.repositories.setdefault(name, given.get("visibility") == "private")
                    self.answer({"url": f"{outer.address}/{name}", "id": name}, 409 if exists else 200)
                elif self.path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    modes = {"uploadMode": "regular", "shouldIgnore": False}
                    self.answer({"files": [{"path": each["path"], **modes} for each in json.loads(body)["files"]]})
                else:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            outer.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    self.answer({"commitUrl": f"{outer.address}/me/demo/commit/1", "commitOid": "1" * 40})

            def answer(self, content: Any, status: int = 200) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that starts a FakeHub, which the client then takes for the Hub."""
    started: list[FakeHub] = []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def begin(**options: Any) -> FakeHub:
        started.append(FakeHub(**options))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", started[-1].address)
        return started[-1]

    yield begin
    for hub in started:
        hub.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "hf"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# é", encoding="utf-8")
    (path / "lightlm_export.json").write_text('{"source": "/home/me"}')
    return path


@pytest.mark.parametrize("private", [True, False])
def test_all_files_but_the_record_are_uploaded(private: bool, start: Any, folder: Path) -> None:
    hub = start()
    assert upload(folder, "me/demo", private=private) == f"{hub.address}/me/demo"
    assert hub.files == {name: (folder / name).read_bytes() for name in ("config.json", "README.md")}
    assert hub.repositories == {"me/demo": private}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert upload(folder, "me/demo", private=private)  # again, into the repository that exists now


def test_nothing_private_goes_into_a_public_repository(start: Any, folder: Path) -> None:
    hub = start(public=("me/demo",))
    with pytest.raises(ConvertError, match="not uploaded to me/demo: the repository is public already"):
        upload(folder, "me/demo", private=True)
    assert hub.files == {}


@pytest.mark.parametrize(("status", "reason"), [(401, "not valid"), (403, "may not write"), (404, "no such org")])
def test_refusals_say_what_to_do(status: int, reason: str, start: Any, folder: Path) -> None:
    start(refuses=status)
    with pytest.raises(ConvertError, match=rf"hf is written, but not uploaded to me/demo: .*{status}: .*{reason}"):
        upload(folder, "me/demo")


def test_without_a_connection(start: Any, folder: Path) -> None:
    start().close()
    with pytest.raises(ConvertError, match=r"the Hub cannot be reached .*or: hf upload me/demo .*/hf$"):
        upload(folder, "me/demo")
    with pytest.raises(ConvertError, match=r"run the same command again$"):  # that command could publish it
        upload(folder, "me/demo", private=True)


@pytest.mark.parametrize("name", ["demo", "a/b/c", "me/de mo", "me/--demo..", "/demo", "me/", "mé/demo"])
def test_wrong_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UsageError, match="--push"):
        check_upload(name)


def test_what_is_known_before_anything_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConvertError, match="there is no token of the Hub; run `hf auth login`, or set HF_TOKEN"):
        check_upload("me/demo")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    check_upload("me/demo")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConvertError, match="HF_HUB_OFFLINE is set"):
        check_upload("me/demo")


def test_licenses() -> None:
    assert [check_license(name) for name in ("MIT", "cc-by-4.0", "llama3.2")] == ["mit", "cc-by-4.0", "llama3.2"]
    for name in ("", "my own", "-x", "é"):
        with pytest.raises(UsageError, match="write the Hub's identifier"):
            check_license(name)
