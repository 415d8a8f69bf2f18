"""Who may use a server. Imports neither torch nor a web framework, so that mistakes are reported at once."""

import ipaddress
import re
from dataclasses import dataclass

from lightlm.errors import UsageError

_ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d+)?")  # as browsers send it: in lower case


@dataclass(frozen=True)
class Access:
    """Who may use a server.

    Args:
        key: what requests must bring; None accepts requests without one, but only those that name this machine as Host.
        origins: other sites whose pages may use the server (CORS); `*` for all.

    Raises:
        UsageError: the key cannot be part of a header, or one of `origins` is not an origin.
    """

    key: str | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise UsageError("--api-key must consist of visible ASCII characters without blanks, and must not be empty")
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                advice = "write a scheme and a host in lower case, such as https://example.org, or * for all sites"
                raise UsageError(f"--cors {origin}: {advice}")

    def check_host(self, host: str) -> None:
        """Raise UsageError if others could reach this host without a key."""
        if self.key is None and not is_loopback(host):
            raise UsageError(
                f"--host {host}: others could use this model; set LIGHTLM_API_KEY to a secret that requests must "
                "bring, or use --host 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host, by its name or address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
