"""Defines `Refusal`, the error that all HTTP endpoints return. The response is in OpenAI's error format: message, type,
parameter, and code."""

from __future__ import annotations

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """Rejects an HTTP request with a status and an error message. `param`: the invalid parameter. `retry_after`: seconds until
    the same request may succeed."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(status, message, param, code, retry_after)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """Returns the body of the response, as JSON values in OpenAI's error format."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return headers | ({"Retry-After": str(self.retry_after)} if self.retry_after is not None else {})
