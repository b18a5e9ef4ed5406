"""Errors as an OpenAI client expects them."""

from __future__ import annotations

from typing import Any

from pyllm.errors import InsufficientMemoryError, NonFiniteError, PyllmError

RETRY_SECONDS = 1
MAX_MESSAGE = 1000  # characters; messages may quote the request
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and what stands in its body.

    `param` names the field of the request that is at fault; with `retry_after` the client may try again after so many
    seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self)[:MAX_MESSAGE], "type": kind, "param": self.param, "code": self.code}}


def refused(field: str, message: str) -> ApiError:
    """A field of the request has a value that cannot be taken."""
    return ApiError(400, f"{field}: {message}", param=field)


def api_error(error: BaseException) -> ApiError:
    """The answer to a request that ended with `error`.

    Only errors raised on purpose are the request's fault. Others are the server's: 500, and what they say is nobody's
    business outside; who calls this writes it into the log.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (MemoryError, InsufficientMemoryError)):
        return internal_error(error)
    if isinstance(error, NonFiniteError):
        return ApiError(500, str(error), code="non_finite")
    if isinstance(error, PyllmError):
        return ApiError(400, str(error))
    return internal_error(error)


def internal_error(error: BaseException) -> ApiError:
    """The answer to requests that ended with an error which is not theirs."""
    if isinstance(error, (MemoryError, InsufficientMemoryError)):
        return ApiError(503, "the server is out of memory: try again later", retry_after=RETRY_SECONDS)
    return ApiError(500, "internal error: the server's log says more", code="internal_error")
