"""The server as a process: its address, its threads, and its end."""

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lightlm.errors import LightLMError
from lightlm.serve.app import Service

MAX_CONNECTIONS = 1000
HEADER_SECONDS = 10.0  # to receive the first line and the headers of a request
GRACE_SECONDS = 5.0  # for answers that have begun, after the first signal to end


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Port 0 takes a free one.

    Raises:
        LightLMError: the address is taken, forbidden, or does not belong to this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        causes = {
            errno.EADDRINUSE: f"port {port} is in use; choose another one with --port, or 0 for any free one",
            errno.EACCES: f"the system does not permit port {port}; choose one above 1023 with --port",
            errno.EADDRNOTAVAIL: "this machine does not have that address; use --host 127.0.0.1",
        }
        cause = causes.get(number or 0) or f"{getattr(error, 'strerror', None) or error}"
        raise LightLMError(f"cannot listen on {host}, port {port}: {cause}") from None


def url_of(listening: socket.socket) -> str:
    """Return the address at which a browser on this machine finds the server."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def serving(service: Service, listening: socket.socket) -> Iterator[Callable[[], bool]]:
    """Context manager in which the service answers on a socket; its end is clean.

    At the end, requests that wait are refused, and answers that have begun have `GRACE_SECONDS`. Then open streams end
    with an error event. An exception in the body ends them at once.

    Returns:
        A function that tells whether the server runs.
    """
    config = uvicorn.Config(
        service.app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="error",  # not a warning for each malformed request
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(GRACE_SECONDS),
    )
    server = uvicorn.Server(config)
    # Outside the main thread, uvicorn leaves the signals alone.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="lightlm-http", daemon=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # not a warning for each client that leaves a stream
    service.loop.start()
    thread.start()
    try:
        yield lambda: thread.is_alive() and service.loop.ready
        service.loop.refuse()
        over = time.monotonic() + GRACE_SECONDS
        while service.loop.busy and time.monotonic() < over:
            time.sleep(0.05)
    finally:
        service.loop.end()
        server.should_exit = True
        thread.join()


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose headers take too long; uvicorn would keep it forever."""

    _timer = None

    def connection_made(self, transport) -> None:  # type: ignore[no-untyped-def]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the time where a request begins, and stop it where its headers are complete."""
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
