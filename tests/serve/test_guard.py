"""Who gets an answer, and what browsers are told."""

import base64
import hashlib
import re

import pytest

from lightlm.errors import UsageError
from lightlm.serve.access import Access, is_loopback
from tests.serve.served import Served, served

KEY = "sk-0123"
ORIGIN = "https://example.org"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "127.0.0.9"])
def test_this_machine_by_any_name_is_answered(server: Served, host: str) -> None:
    assert server.client.get("/v1/models", headers={"Host": f"{host}:8000"}).status_code == 200
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", ""]
)
def test_another_name_is_refused_so_dns_rebinding_reads_nothing(server: Served, host: str) -> None:
    for path in ("/", "/v1/models", "/metrics"):
        response = server.client.get(path, headers={"Host": host})
        assert response.status_code in (400, 403)
        assert "tiny" not in response.text


def test_without_cors_no_other_site_may_read_or_ask(server: Served) -> None:
    headers = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    preflight = server.client.options("/v1/completions", headers=headers)
    assert preflight.status_code == 405
    assert not any(name.startswith("access-control") for name in preflight.headers)
    # What a page can send without a preflight.
    simple = server.client.post("/v1/completions", content='{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert simple.status_code == 415
    assert "Content-Type: application/json" in simple.json()["error"]["message"]


def test_the_page_may_run_only_its_own_script_and_talk_only_to_its_server(server: Served) -> None:
    response = server.client.get("/")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]
    for tag in ("script", "style"):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.findall(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\son\w+=", response.text)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_a_key_is_needed_for_all_but_the_page_and_health() -> None:
    with served(access=Access(KEY, (ORIGIN,))) as server:
        ask = server.client.get
        assert ask("/").status_code == ask("/health").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": KEY},
        ):
            for path in ("/v1/models", "/metrics", "/nothing"):
                response = ask(path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        raw = [("Authorization", b"Bearer \xff\xfe")]
        assert ask("/v1/models", headers=raw).status_code == 401
        headers = {"Authorization": f"Bearer {KEY}", "Host": "models.example.org"}
        assert ask("/v1/models", headers=headers).status_code == 200

        # CORS, as asked for: the preflight comes without the key.
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",  # as OpenAI's client
        }
        preflight = server.client.options("/v1/completions", headers={"Origin": ORIGIN, **asked})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        # As Chrome asks where a public page uses a server on the user's own machine.
        private = asked | {"Access-Control-Request-Private-Network": "true"}
        local = server.client.options("/v1/completions", headers={"Origin": ORIGIN, **private})
        assert (local.status_code, local.headers["access-control-allow-private-network"]) == (200, "true")
        other = server.client.options("/v1/completions", headers={"Origin": "https://evil.example", **asked})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        assert ask("/v1/models", headers=headers | {"Origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN


def test_a_failure_of_the_server_is_counted_and_a_browser_may_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(access=Access(KEY, (ORIGIN,))) as server:
        monkeypatch.setattr(server.service.reader, "completion", lambda body: 1 / 0)
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        response = server.client.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": ORIGIN})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "internal error; the server's log tells more"
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["x-content-type-options"] == "nosniff"
        assert 'lightlm_requests_total{path="/v1/completions",status="500"} 1' in server.service.metrics.write()


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\n"])
def test_a_key_fits_into_a_header(key: str) -> None:
    with pytest.raises(UsageError, match="--api-key"):
        Access(key)


@pytest.mark.parametrize(
    "origin",
    [
        *("example.org", "https://example.org/", "https://", "null", "ftp://example.org"),
        *("https://Example.org", "https://*.example.org", "https://me@example.org", "https://example.org?x"),
    ],
)
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(UsageError, match="--cors"):
        Access(origins=(origin,))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org", ""])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(UsageError, match="LIGHTLM_API_KEY"):
        Access().check_host(host)
    Access(KEY).check_host(host)


def test_unknown_paths_and_methods_are_errors_in_the_same_shape(server: Served) -> None:
    for response, status in (
        (server.client.get("/v1/nothing"), 404),
        (server.client.get("/v1/completions"), 405),
        (server.client.delete("/"), 405),
        (server.client.get("/../../etc/passwd"), 404),
        (server.client.post("/v1/embeddings", json={}), 404),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
