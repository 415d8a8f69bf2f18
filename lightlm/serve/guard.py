"""Who may ask: the Host header, API keys, and the headers that tell browsers what a page may do.

Each class is ASGI middleware. https://asgi.readthedocs.io/en/latest/specs/www.html
"""

import base64
import hashlib
import hmac
import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightlm.serve.access import is_loopback
from lightlm.serve.errors import RequestError
from lightlm.serve.metrics import Metrics

OPEN_PATHS = ("/", "/health")  # without a key: the page, which holds no secrets and asks for the key, and probes
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def error_response(error: RequestError) -> Response:
    """Return an error as the answer to a request."""
    # In ASCII: the message may quote half of a surrogate pair, which UTF-8 cannot hold.
    return Response(json.dumps(error.body), error.status, error.headers, "application/json")


class Observe:
    """Count requests by path and status, and add headers that every answer has."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str], cross_origin: bool) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._headers = {**_HEADERS, **({"cross-origin-resource-policy": "cross-origin"} if cross_origin else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"  # anyone may ask for any number of paths

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.add("lightlm_requests_total", 1, path, str(message["status"]))
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, observed)


class LocalHostOnly:
    """Refuse requests that name another host than this machine.

    A page on the web may let its own name point to 127.0.0.1, and so read answers as if they came from its own server
    (DNS rebinding). The browser then sends that name as Host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if is_loopback(name):
            await self._app(scope, receive, send)
            return
        message = (
            f"this server answers to localhost only, not to {name[:80]!r}; start it with --api-key for other names"
        )
        await error_response(RequestError(message, 403, code="wrong_host"))(scope, receive, send)


class RequireKey:
    """Refuse requests without the key in `Authorization: Bearer KEY`, except for `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._digest = app, _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        known = hmac.compare_digest(_digest(key.strip()), self._digest)  # takes as long for any key
        if (kind.lower() == "bearer" and known) or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        message = "this server needs an API key: send the header Authorization: Bearer KEY"
        error = RequestError(
            message if not key else "wrong API key", 401, code="invalid_api_key", www_authenticate="Bearer"
        )
        await error_response(error)(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def page_policy(page: str) -> str:
    """Return the Content-Security-Policy of a page: only its own script and style, requests only to this server."""
    hashes = {tag: _inline_hash(page, tag) for tag in ("script", "style")}
    return "; ".join(
        [
            "default-src 'none'",
            *(f"{tag}-src '{digest}'" for tag, digest in hashes.items()),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def _inline_hash(page: str, tag: str) -> str:
    text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
