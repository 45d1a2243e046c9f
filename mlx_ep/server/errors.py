"""What a client is told: an HTTP status, and OpenAI's or Anthropic's error object."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is no answer.

    Attributes:
        status: of HTTP.
        param: the field of the body that is wrong, as a path (``messages.0.role``).
        code: one of OpenAI's words for it.
        retry_after: seconds, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def kind(self) -> str:
        return _TYPES.get(self.status, "api_error")

    @property
    def openai(self) -> dict[str, Any]:
        """OpenAI's error schema."""
        error = {
            "message": self.message,
            "type": "server_error" if self.status >= 500 else self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def anthropic(self) -> dict[str, Any]:
        """Anthropic's error schema."""
        return {
            "type": "error",
            "error": {"type": self.kind, "message": self.message},
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return {}
        return {"retry-after": str(self.retry_after)}


def wrong(param: str, message: str) -> ApiError:
    """400: `message` says what `param` must be, what was given."""
    return ApiError(400, f"{param} {message}", param, "invalid_value")


def unavailable(reason: str) -> ApiError:
    """503: the server ends, or a rank has failed."""
    return ApiError(503, reason, code="unavailable", retry_after=5)
