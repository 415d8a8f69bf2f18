"""Errors of the HTTP interface, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

# The kind of error by status, as OpenAI's clients expect it.
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that gets no answer, or whose answer ends early.

    Args:
        message: what is wrong and what to do.
        param: the field of the request that is wrong.
        code: a word for programs, such as `context_length_exceeded`.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document that tells a client about it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
